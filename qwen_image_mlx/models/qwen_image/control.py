"""The networks that steer Qwen-Image 1.x by an image: three families, whose results are added to the target's tokens.

Each is told by the tensors of its file; its blocks are the transformer's own. Sources: `QwenImageControlNetModel` of
diffusers, the control transformer of VideoX-Fun (alibaba-pai), and the block-wise ControlNet of DiffSynth-Studio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import nn
from ..layers import Linear, OnLayer
from ..rotary import Rotary
from .config import TransformerConfig
from .transformer import EPS, BlockRows, TransformerBlock


@dataclass(frozen=True)
class ControlConfig(TransformerConfig):
    """The sizes of a ControlNet: the transformer's that it steers, and two that its tensors show.

    Attributes:
        num_layers: its own blocks.
        condition_channels: of a token of the encoded control image.
    """

    condition_channels: int = 64

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map; the last block's text output is not used."""
        return ({"n": n, "first": n == 0, "last": n == self.num_layers - 1} for n in range(self.num_layers))


class ControlNet(nn.Module):
    """InstantX's ControlNets: a copy of the first blocks, which sees the latents and the control image."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.img_in: Linear = Linear(config.in_channels, config.dim)
        self.controlnet_x_embedder: Linear = Linear(config.condition_channels, config.dim)
        self.txt_norm: nn.RMSNorm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.txt_in: Linear = Linear(config.joint_attention_dim, config.dim)
        self.transformer_blocks: list[TransformerBlock] = [
            TransformerBlock(config, row["last"]) for row in config.blocks
        ]
        self.controlnet_blocks: list[Linear] = [Linear(config.dim, config.dim) for _ in config.blocks]

    def project_text(self, embeddings: mx.array) -> mx.array:
        """Encoder states (B, L, joint_attention_dim) to text tokens (B, L, D); the same in every step."""
        return self.txt_in(self.txt_norm(embeddings))

    def project_condition(self, condition: mx.array) -> mx.array:
        """The encoded control image (B, N, condition channels) to tokens (B, N, D); the same in every step."""
        return self.controlnet_x_embedder(condition)

    def __call__(
        self,
        latents: mx.array,
        condition: mx.array,
        text: mx.array,
        blocks: Sequence[BlockRows],
        rotary: Rotary,
        on_layer: OnLayer | None = None,
    ) -> list[mx.array]:
        """The residual (B, N, D) of each block.

        Args:
            latents: packed latents (B, N, in_channels) of the target.
            condition: `project_condition`'s result (B, N, D).
            text: `project_text`'s result (B, L, D).
            blocks: this step's rows of each block.
            rotary: tables for L + N tokens.
            on_layer: called after each block.
        """
        images, residuals = [self.img_in(latents) + condition], []
        for block, rows, project in zip(self.transformer_blocks, blocks, self.controlnet_blocks, strict=True):
            images, after = block(images, text, rows, rotary)
            residuals.append(project(images[0]))
            if on_layer is not None:
                on_layer([residuals[-1], images[0], *([] if after is text else [after])])
            text = after
        return residuals


class FunControlNet(nn.Module):
    """The Fun ControlNets: a chain of blocks with the transformer's own time, text and image tokens as input."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.control_img_in: Linear = Linear(config.condition_channels, config.dim)
        self.control_blocks: list[FunBlock] = [FunBlock(config, **row) for row in config.blocks]

    def project_condition(self, condition: mx.array) -> mx.array:
        """The encoded control image (B, N, condition channels) to tokens (B, N, D); the same in every step."""
        return self.control_img_in(condition)

    def __call__(
        self,
        image: mx.array,
        condition: mx.array,
        texts: Sequence[mx.array],
        blocks: Sequence[BlockRows],
        rotary: Sequence[Rotary],
        on_layer: OnLayer | None = None,
    ) -> list[list[mx.array]]:
        """The hints (B, N, D) of each block, for each text.

        Args:
            image: the transformer's tokens (B, N, D) of the target before its first block.
            condition: `project_condition`'s result (B, N, D).
            texts: the transformer's projected texts (B, L, D).
            blocks: this step's rows of each block.
            rotary: for each text, tables for L + N tokens.
            on_layer: called after each block.
        """
        streams: list[tuple[list[mx.array], mx.array]] = [([condition], text) for text in texts]
        hints: list[list[mx.array]] = []
        for number, (block, rows) in enumerate(zip(self.control_blocks, blocks, strict=True)):
            if number == 0:
                streams = [([block.before_proj(images[0]) + image], text) for images, text in streams]
            before = {id(text) for _, text in streams}
            streams = [
                block(images, text, rows, tables) for (images, text), tables in zip(streams, rotary, strict=True)
            ]
            hints.append([block.after_proj(images[0]) for images, _ in streams])
            if on_layer is not None:
                on_layer([*hints[-1], *(x for images, t in streams for x in (*images, t) if id(x) not in before)])
        return hints


class FunBlock(TransformerBlock):
    """A block with what enters the chain, in the first one, and what leaves it."""

    def __init__(self, config: ControlConfig, n: int, first: bool, last: bool):
        super().__init__(config, last)
        if first:
            self.before_proj: Linear = Linear(config.dim, config.dim)
        self.after_proj: Linear = Linear(config.dim, config.dim)


class BlockwiseControlNet(nn.Module):
    """DiffSynth's block-wise ControlNets: two matrices for each block of the transformer."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.img_in: Linear = Linear(config.condition_channels, config.dim)
        self.controlnet_blocks: list[BlockwiseBlock] = [BlockwiseBlock(config) for _ in config.blocks]

    def project_condition(self, condition: mx.array) -> mx.array:
        """The encoded control image (B, N, condition channels) to tokens (B, N, D); the same in every step."""
        return self.img_in(condition)


class BlockwiseBlock(nn.Module):
    """What one block of the transformer is given of the control image."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.x_rms: nn.RMSNorm = nn.RMSNorm(config.dim, eps=EPS)
        self.y_rms: nn.RMSNorm = nn.RMSNorm(config.dim, eps=EPS)
        self.input_proj: Linear = Linear(config.dim, config.dim)
        self.output_proj: Linear = Linear(config.dim, config.dim)

    def __call__(self, image: mx.array, condition: mx.array) -> mx.array:
        """What is added to the target's tokens (B, N, D) after the block, from the condition's (B, N, D)."""
        hidden = self.input_proj(self.x_rms(image) + self.y_rms(condition))
        return self.output_proj(nn.gelu(hidden))
