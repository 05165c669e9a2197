"""The network of Qwen-Image 1.x in training, with the modulation of every sample's own noise level.

When all weights are trained it includes the modulation; with a LoRA that is frozen, and read from a table of levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...models.qwen_image.rope import Segment, rotary_tables
from ...models.qwen_image.transformer import BlockRows, Modulation, Rows, Transformer, TransformerBlock
from ...models.rotary import Rotary
from ..network import TrainingNetwork
from ..seam import Segments


class Network(TrainingNetwork):
    """Qwen-Image 1.x in training."""

    transformer: Transformer

    @staticmethod
    def lay_out(segments: Segments, length: int, axes_dims: Sequence[int]) -> Rotary:
        """The tables of all tokens, text first."""
        return rotary_tables([Segment(*segment) for segment in segments], length, axes_dims)

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
            _recompute if self._checkpointing else None,
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
