"""The network in training: a transformer, with the modulation of every sample's own noise level.

When all weights are trained it includes the modulation; with a LoRA that is frozen, and read from a table of levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx

from ..models import nn
from ..models.qwen_image.config import TransformerConfig
from ..models.qwen_image.modulation import TimeModulation
from ..models.qwen_image.rope import Segment, rotary_tables
from ..models.qwen_image.transformer import BlockRows, Modulation, Rows, Transformer, TransformerBlock
from ..models.rotary import Rotary
from .seam import Segments


@dataclass(frozen=True)
class Batch:
    """Samples of one shape: the same segments, and prompts of the same number of tokens, so that nothing is padded.

    Attributes:
        latents: clean packed latents of the target, all its frames (B, N, C), fp32.
        text: encoder states (B, L, J).
        segments: the target's frames, then the references; what the generation's seam made of them.
        references: packed latents (B, R, C), fp32, or None.
    """

    latents: mx.array
    text: mx.array
    segments: Segments
    references: mx.array | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """One batch of several of the same shape."""
        first = batches[0]
        join = {"latents": mx.concatenate([b.latents for b in batches]),
                "text": mx.concatenate([b.text for b in batches])}  # fmt: skip
        if first.references is not None:
            join["references"] = mx.concatenate([b.references for b in batches])
        return replace(first, **join)


class Network(nn.Module):
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
        self._run_block = _recompute if checkpointing else None
        self._rotary = cache(
            lambda segments, length: rotary_tables([Segment(*s) for s in segments], length, config.axes_dims_rope)
        )

    def rotary(self, batch: Batch) -> Rotary:
        """The rotary tables of a batch's tokens."""
        return self._rotary(batch.segments, batch.text.shape[1])

    def __call__(
        self,
        latents: mx.array,
        text: mx.array,
        sigmas: mx.array,
        rotary: Rotary,
        references: mx.array | None = None,
        rows: Modulation | None = None,
    ) -> mx.array:
        """Velocity (B, N, C) of noisy packed latents (B, N, C); all arrays in the dtype to compute in.

        Args:
            latents: of the target.
            text: encoder states (B, L, J).
            sigmas: noise levels (B,), fp32.
            rotary: the tables that `rotary` returns for the batch.
            references: packed latents (B, R, C), or None.
            rows: the modulation where it is not trained.
        """
        transformer = self.transformer
        return transformer(
            latents,
            transformer.project_text(text),
            self.modulation(sigmas, latents.dtype) if rows is None else rows,
            rotary,
            None if references is None else transformer.project_references(references),
            self._run_block,
        )


def _recompute(
    block: TransformerBlock, images: list[mx.array], txt: mx.array, rows: BlockRows, rotary: Rotary
) -> tuple[list[mx.array], mx.array]:
    """Runs a block without keeping its intermediate arrays, which the gradient recomputes."""

    def run(
        parameters: dict, images: list[mx.array], txt: mx.array, rows: Sequence[Rows], rotary: Sequence[mx.array]
    ) -> tuple[list[mx.array], mx.array]:
        block.update(parameters)
        return block(images, txt, BlockRows(*rows), Rotary(*rotary))

    return mx.checkpoint(run)(block.trainable_parameters(), images, txt, tuple(rows), tuple(rotary))
