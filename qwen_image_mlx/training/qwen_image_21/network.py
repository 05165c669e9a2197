"""The network of Qwen-Image-2.1 in training: prompt, references and target in one stream, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ...models import nn
from ...models.qwen_image_21.config import TransformerConfig
from ...models.qwen_image_21.denoiser import interleave
from ...models.qwen_image_21.modulation import TimeModulation
from ...models.qwen_image_21.rope import Run, lay_out, rotary_tables
from ...models.qwen_image_21.transformer import Rows, Transformer, TransformerBlock
from ...models.rotary import Rotary
from ..network import Batch
from ..seam import Segments


class Modulated(NamedTuple):
    """The modulation of a batch.

    Attributes:
        own: rows of the target's tokens, (D,) of a single sample, or (B, 1, D).
        still: rows of timestep 0, for prompt and references, (D,) or (1, 1, D).
    """

    own: Rows
    still: Rows


class Sequence21(NamedTuple):
    """The tokens of a batch.

    Attributes:
        runs: of the prefix, prompt and references.
        before: rotary tables of the prefix.
        after: those of the target.
    """

    runs: tuple[Run, ...]
    before: Rotary
    after: Rotary


class Network21(nn.Module):
    """A transformer and, if it is trained too, its modulation.

    Args:
        transformer: dense or quantized; its frozen parameters stay as they are.
        config: its config.
        modulation: the trained one; None takes each batch's rows from a table.
        checkpointing: keep only the inputs of each block, and recompute the rest for the gradient.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: TransformerConfig,
        modulation: TimeModulation | None = None,
        *,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.transformer = transformer
        if modulation is not None:
            self.modulation = modulation
        self._run = _recompute if checkpointing else _run
        self._sequence = cache(lambda segments, length: _sequence(segments, length, config.axes_dims_rope))

    def rotary(self, batch: Batch) -> Sequence21:
        """The tokens of a batch, with their rotary tables."""
        return self._sequence(batch.segments, batch.text.shape[1])

    def __call__(
        self,
        latents: mx.array,
        text: mx.array,
        sigmas: mx.array,
        rotary: Sequence21,
        references: mx.array | None = None,
        rows: Modulated | None = None,
    ) -> mx.array:
        """Velocity (B, N, C) of noisy packed latents (B, N, C); all arrays in the dtype to compute in.

        Args:
            latents: of the target.
            text: encoder states (B, L, J), with places for the references.
            sigmas: noise levels (B,), fp32.
            rotary: what `rotary` returns for the batch.
            references: packed latents (B, R, C), one image after the other, or None.
            rows: the modulation where it is not trained.
        """
        transformer = self.transformer
        if rows is None:
            rows = Modulated(self.modulation(sigmas, latents.dtype), self.modulation(mx.zeros(1), latents.dtype))
        shown, start = [], 0
        for run in rotary.runs:
            if run.grid is not None:
                shown.append(transformer.project_references(references[:, start : start + run.length]))
                start += run.length
        prefix = interleave(transformer.project_text(text), shown, rotary.runs)
        target = transformer.project_references(latents)
        for block in transformer.transformer_blocks:
            prefix, target = self._run(block, prefix, target, rotary, rows)
        return transformer.read_out(target, rows.own)


def _sequence(segments: Segments, length: int, axes_dims: Sequence[int]) -> Sequence21:
    """The tokens of samples with `length` states; a reference's segment begins with the first of its places in them."""
    (_, *grid), *references = segments
    runs = tuple(lay_out(length, [start for start, *_ in references], [(h, w) for _, h, w in references]))
    tables = rotary_tables([*runs, Run.image(*grid)], axes_dims)
    count = sum(run.length for run in runs)
    before, after = (Rotary(*(table[part] for table in tables)) for part in (slice(count), slice(count, None)))
    return Sequence21(runs, before, after)


def _run(
    block: TransformerBlock, prefix: mx.array, target: mx.array, rotary: Sequence21, rows: Modulated
) -> tuple[mx.array, mx.array]:
    """Prefix and target after a block."""
    seen, prefix = block.prefix(prefix, rotary.runs, rows.still, rotary.before)
    return prefix, block(target, rows.own, rotary.after, seen)


def _recompute(
    block: TransformerBlock, prefix: mx.array, target: mx.array, rotary: Sequence21, rows: Modulated
) -> tuple[mx.array, mx.array]:
    """Runs a block without keeping its intermediate arrays, which the gradient recomputes."""

    def run(
        parameters: dict,
        prefix: mx.array,
        target: mx.array,
        tables: Sequence[Sequence[mx.array]],
        rows: Sequence[Sequence[mx.array]],
    ) -> tuple[mx.array, mx.array]:
        block.update(parameters)
        before, after = (Rotary(*table) for table in tables)
        modulated = Modulated(*(Rows(*part) for part in rows))
        return _run(block, prefix, target, Sequence21(rotary.runs, before, after), modulated)

    tables = tuple(rotary.before), tuple(rotary.after)
    parts = tuple(rows.own), tuple(rows.still)
    return mx.checkpoint(run)(block.trainable_parameters(), prefix, target, tables, parts)
