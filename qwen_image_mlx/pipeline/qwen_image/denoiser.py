"""The velocities of Qwen-Image 1.x for one image: modulation table, rotary tables and projections, made once.

It stands above `models/` because it reads weights: the modulation's matrices, a third of the transformer, are read from
their file, used for all steps at once, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...errors import RequestError
from ...models.layers import OnLayer
from ...models.qwen_image.config import TransformerConfig
from ...models.qwen_image.rope import Segment, place_images, rotary_tables, text_start
from ...models.qwen_image.transformer import Hidden, Modulation, Transformer
from ...registry import TRANSFORMER
from ..components import Components
from ..reporter import Reporter
from ..seams import Conditions, ControlledDenoiser, Controls
from .control import Steered
from .costs import COSTS
from .states import check_length
from .table import modulation_table

# From noise levels to their modulation rows; a network in training has this instead of files.
Rows = Callable[[np.ndarray], list[Modulation]]

_TABLE = "modulation table"


class QwenImageDenoiser(ControlledDenoiser):
    """The `Denoiser` of Qwen-Image 1.x.

    Args:
        components, conditions, report: the arguments of `DenoiserClass`.
        rows: makes the modulation if it is not read from the checkpoint's files.
    """

    costs: ClassVar = COSTS
    keeps_prefix: ClassVar = False

    def __init__(
        self,
        components: Components,
        conditions: Conditions,
        report: Reporter,
        *,
        rows: Rows | None = None,
    ):
        config: TransformerConfig = components.config(TRANSFORMER)
        segments = _segments(config, conditions)
        if rows is not None:
            self._table = rows(conditions.sigmas)
        else:
            self._table = _table(components, conditions.sigmas, report)
        self._transformer: Transformer = components.network(TRANSFORMER)
        self._text = [self._transformer.project_text(states.astype(components.dtype)) for states in conditions.branches]
        self._rotary = [
            rotary_tables(segments, states.shape[1], config.axes_dims_rope) for states in conditions.branches
        ]
        self._references = None
        if conditions.references:
            shown = mx.concatenate([r.latents for r in conditions.references], axis=1).astype(components.dtype)
            self._references = self._transformer.project_references(shown)
        mx.eval(self._text, self._rotary, [] if self._references is None else self._references)
        steered = Steered(self._text, self._transformer.project_references)  # the same projection
        super().__init__(Controls(components, conditions, steered, report))

    def _enter(self, latents: mx.array, branches: int | None) -> Hidden:
        return self._transformer.enter(latents, self._text[:branches], self._references)

    def _run(
        self, hidden: Hidden, evaluation: int, blocks: slice, on_layer: OnLayer | None, hints: list[Callable[..., Any]]
    ) -> Hidden:
        rotary = self._rotary[: len(hidden.texts)]
        return self._transformer.run(hidden, self._table[evaluation], rotary, blocks, on_layer=on_layer, hints=hints)

    def leave(self, hidden: Hidden, evaluation: int) -> Sequence[mx.array]:
        """As `Denoiser.leave`."""
        return self._transformer.leave(hidden, self._table[evaluation])

    def signal(self, hidden: Hidden, evaluation: int) -> mx.array:
        """As `Denoiser.signal`."""
        return self._transformer.signal(hidden, self._table[evaluation])

    @staticmethod
    def check(components: Components, conditions: Conditions) -> None:
        """Raises RequestError if states do not have the width that the transformer takes."""
        config: TransformerConfig = components.config(TRANSFORMER)
        dim, start = config.joint_attention_dim, text_start(_segments(config, conditions))
        for states in conditions.branches:
            if states.ndim != 3 or states.shape[0] != 1 or states.shape[2] != dim:
                raise RequestError(
                    f"the encoding has the shape {tuple(states.shape)}, but this model needs (1, tokens, {dim})"
                )
            check_length(states.shape[1], start)

    @staticmethod
    def kept_values(config: TransformerConfig, evaluations: int, prefix_tokens: int, branches: int) -> int:
        """The number of values in the modulation rows of all evaluations."""
        return evaluations * config.modulation_size

    @staticmethod
    def pass_flop(config: TransformerConfig, target_tokens: int, prefix_tokens: int) -> float:
        """As `DenoiserClass.pass_flop`: each token meets 12 D^2 weights of a block, whichever stream it is in."""
        tokens, dim = target_tokens + prefix_tokens, config.dim
        return config.num_layers * (24.0 * dim**2 * tokens + 4.0 * tokens**2 * dim)


def _segments(config: TransformerConfig, conditions: Conditions) -> list[Segment]:
    """The target's frames, then the references."""
    grids = [(conditions.rows, conditions.columns)] * conditions.frames
    grids += [(reference.height, reference.width) for reference in conditions.references]
    return place_images(grids, config.use_layer3d_rope)


def _table(components: Components, sigmas: np.ndarray, report: Reporter) -> list[Modulation]:
    """The modulation of every evaluation; the last one is kept, so that a sweep over seeds makes it once."""
    kept = components.kept
    if _TABLE not in kept or not np.array_equal(kept[_TABLE][0], sigmas):
        kept.pop(_TABLE, None)  # released first: there may not be room for two
        with report.stage("load", "modulation"):
            made = modulation_table(
                components.weights(TRANSFORMER), sigmas, components.dtype, components.config(TRANSFORMER).zero_cond_t,
                components.adapters,
            )  # fmt: skip
        kept[_TABLE] = sigmas, made
    table: list[Modulation] = kept[_TABLE][1]
    return table
