"""What ControlNets add to the image tokens of Qwen-Image 1.x: one class for each family, made once for an image.

Each is a `ControlBranch` (`pipeline/seams.py`). Its modulation is read, used for all steps at once, and dropped, as the
transformer's is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.qwen_image.rope import place_images, rotary_tables
from ...models.qwen_image.transformer import BlockRows, Hint
from ...registry import TRANSFORMER
from ..components import Components
from ..reporter import Reporter
from ..seams import Conditions, ControlInput
from .table import Folding


@dataclass(frozen=True)
class Steered:
    """What a ControlNet is given of the transformer that it steers.

    Attributes:
        texts: the projected text (1, L, D) of each branch.
        project_latents: packed latents (1, N, C) of the target to its tokens (1, N, D) before the first block.
    """

    texts: Sequence[mx.array]
    project_latents: Callable[[mx.array], mx.array]


class ResidualBranch:
    """InstantX's ControlNets: run once a step, with the prompt, and added in all passes.

    Each residual serves `ceil(blocks / residuals)` blocks of the transformer in a row. Source: diffusers.
    """

    def __init__(
        self, components: Components, conditions: Conditions, control: ControlInput, steered: Steered, report: Reporter
    ):
        dtype, depth = components.dtype, components.depth(TRANSFORMER)

        def rows() -> list[list[BlockRows]]:
            folding = Folding(components.weights(control.role), dtype)
            return _by_step(folding, folding.embedding(conditions.sigmas), len(conditions.sigmas))

        self._table = _kept(components, control.role, conditions.sigmas, report, rows)
        self._network = components.network(control.role)
        self._pace = components.pace(control.role)
        self._every = -(-depth // components.depth(control.role))
        self._scale = mx.array(control.scale, dtype=dtype)
        self._text = self._network.project_text(conditions.prompt.astype(dtype))
        self._rotary = _target_tables(components, conditions, self._text)
        self._condition = self._network.project_condition(control.tokens.astype(dtype))
        mx.eval(self._text, self._rotary, self._condition)

    def hint(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Hint:
        """The residuals of one evaluation; see `ControlBranch.hint`."""
        rows = self._table[evaluation]
        residuals = self._network(latents, self._condition, self._text, rows, self._rotary, self._pace)
        scaled = [self._scale * residual for residual in residuals]
        return lambda block, text, image: scaled[block // self._every]

    @staticmethod
    def kept_values(config: Any, evaluations: int, tokens: int, branches: int) -> int:
        """Rows of all evaluations, the condition, and a step's residuals."""
        values: int = _rows(config, evaluations) + (config.num_layers + 1) * tokens * config.dim
        return values


class FunBranch:
    """The Fun ControlNets: run in each pass, with its prompt; each hint is added once, at evenly spaced blocks.

    Their blocks take the transformer's own time embedding. Source: VideoX-Fun.
    """

    def __init__(
        self, components: Components, conditions: Conditions, control: ControlInput, steered: Steered, report: Reporter
    ):
        dtype, depth = components.dtype, components.depth(TRANSFORMER)

        def rows() -> list[list[BlockRows]]:
            time = Folding(components.weights(TRANSFORMER), dtype, components.adapters)
            folding, layers = Folding(components.weights(control.role), dtype), components.rows[control.role].layers
            return _by_step(folding, time.embedding(conditions.sigmas), len(conditions.sigmas), layers)

        self._table = _kept(components, control.role, conditions.sigmas, report, rows)
        self._steered = steered
        self._network = components.network(control.role)
        self._pace = components.pace(control.role)
        self._every = -(-depth // components.depth(control.role))
        self._scale = mx.array(control.scale, dtype=dtype)
        self._rotary = [_target_tables(components, conditions, text) for text in steered.texts]
        self._condition = self._network.project_condition(control.tokens.astype(dtype))
        mx.eval(self._rotary, self._condition)

    def hint(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Hint:
        """The hints of one evaluation; see `ControlBranch.hint`."""
        image = self._steered.project_latents(latents)
        texts, rotary = self._steered.texts[:branches], self._rotary[:branches]
        hints = self._network(image, self._condition, texts, self._table[evaluation], rotary, self._pace)
        scaled = [[self._scale * hint for hint in of_block] for of_block in hints]

        def hint(block: int, text: int, _: mx.array) -> mx.array | None:
            number, between = divmod(block, self._every)
            return None if between else scaled[number][text]

        return hint

    @staticmethod
    def kept_values(config: Any, evaluations: int, tokens: int, branches: int) -> int:
        """Rows of all evaluations, the condition, and a step's hints."""
        values: int = _rows(config, evaluations) + (config.num_layers * branches + 1) * tokens * config.dim
        return values


class BlockwiseBranch:
    """DiffSynth's block-wise ControlNets: two matrices after each block, which see the tokens there."""

    def __init__(
        self, components: Components, conditions: Conditions, control: ControlInput, steered: Steered, report: Reporter
    ):
        self._network = components.network(control.role)
        self._scale = mx.array(control.scale, dtype=components.dtype)
        self._condition = self._network.project_condition(control.tokens.astype(components.dtype))
        mx.eval(self._condition)

    def hint(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Hint:
        """A function of the tokens; see `ControlBranch.hint`. Its layers are read in order, if they are streamed."""
        layers: Iterator[Any] = iter(())
        layer, before = None, -2  # no block

        def hint(block: int, text: int, image: mx.array) -> mx.array:
            nonlocal layers, layer, before
            if text == 0 or block != before:  # else another text after the same block
                if block != before + 1:  # the first of a pass, or blocks were left out
                    layers = iter(self._network.controlnet_blocks[block:])
                layer, before = next(layers), block
            assert layer is not None
            added: mx.array = self._scale * layer(image, self._condition)
            return added

        return hint

    @staticmethod
    def kept_values(config: Any, evaluations: int, tokens: int, branches: int) -> int:
        """The condition."""
        values: int = tokens * config.dim
        return values


def _rows(config: Any, evaluations: int) -> int:
    values: int = 12 * evaluations * config.num_layers * config.dim
    return values


def _by_step(
    folding: Folding, embedding: mx.array, steps: int, layers: str = "transformer_blocks"
) -> list[list[BlockRows]]:
    """The rows of each block in each step."""
    blocks = folding.blocks(embedding, layers)
    return [[BlockRows(text[n], image[n], image[n]) for text, image in blocks] for n in range(steps)]


def _kept(components: Components, role: str, sigmas: np.ndarray, report: Reporter, make: Any) -> list[list[BlockRows]]:
    """A ControlNet's rows by step; those of the last schedule are kept for the next image."""
    place = f"{role} rows"
    if place not in components.kept or not np.array_equal(components.kept[place][0], sigmas):
        components.kept.pop(place, None)
        with report.stage("load", "modulation"):
            components.kept[place] = sigmas, make()
    rows: list[list[BlockRows]] = components.kept[place][1]
    return rows


def _target_tables(components: Components, conditions: Conditions, text: mx.array) -> Any:
    """Rotary tables of a text (1, L, D) and the target alone: a ControlNet sees no references."""
    config = components.config(TRANSFORMER)
    segments = place_images([(conditions.rows, conditions.columns)] * conditions.frames, False)
    return rotary_tables(segments, text.shape[1], config.axes_dims_rope)
