"""The network that steers Qwen-Image-2.1 by an image: a chain of blocks next to the transformer's.

Its hints are added to the whole sequence, so text and references change with them. Source: the Fun ControlNets of
alibaba-pai, as VideoX-Fun runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from .. import nn
from ..layers import Linear, OnLayer
from ..rotary import Rotary
from .config import TransformerConfig
from .transformer import Prefix, Rows, TransformerBlock


@dataclass(frozen=True)
class ControlConfig(TransformerConfig):
    """The sizes of a ControlNet: the transformer's that it steers, and two that its tensors show.

    Attributes:
        num_layers: its own blocks.
        condition_channels: of a token of the encoded control image.
    """

    condition_channels: int = 129

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map."""
        return ({"n": n, "first": n == 0} for n in range(self.num_layers))


class Added(NamedTuple):
    """What is added to a sequence: to its prefix (B, P, D), and to the target (B, N, D)."""

    prefix: mx.array
    target: mx.array


class FunControlNet(nn.Module):
    """Blocks like the transformer's, with its modulation and positions, whose results are projected."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.control_img_in: Linear = Linear(config.condition_channels, config.dim)
        self.control_blocks: list[FunBlock] = [FunBlock(config, row["first"]) for row in config.blocks]

    def project_condition(self, condition: mx.array) -> mx.array:
        """The encoded control image (B, N, condition channels) to tokens (B, N, D); the same in every step."""
        return self.control_img_in(condition)

    def __call__(
        self,
        target: mx.array,
        condition: mx.array,
        prefixes: Sequence[tuple[Prefix, Rotary]],
        rows: Rows,
        still: Rows,
        on_layer: OnLayer | None = None,
    ) -> list[list[Added]]:
        """The hints of each block, for each prefix.

        Args:
            target: the transformer's tokens (B, N, D) of the target before its first block.
            condition: `project_condition`'s result (B, N, D); text and references have zeros.
            prefixes: for each prompt, what comes before the target, and the target's tables.
            rows, still: of this step, and of timestep 0.
            on_layer: called after each block.
        """
        states: list[Added] = []
        hints: list[list[Added]] = []
        for number, block in enumerate(self.control_blocks):
            if number == 0:
                begun = block.before_proj(condition) + target
                nothing = block.before_proj(mx.zeros_like(condition[:, :1]))
                states = [Added(prefix.hidden + nothing, begun) for prefix, _ in prefixes]
            after = []
            for state, (prefix, rotary) in zip(states, prefixes, strict=True):
                seen, hidden = block.prefix(state.prefix, prefix.runs, still, prefix.rotary)
                after.append(Added(hidden, block(state.target, rows, rotary, seen)))
            states = after
            hints.append([Added(block.after_proj(s.prefix), block.after_proj(s.target)) for s in states])
            if on_layer is not None:
                on_layer([array for pair in (*hints[-1], *states) for array in pair])
        return hints


class FunBlock(TransformerBlock):
    """A block with what enters the chain, in the first one, and what leaves it."""

    def __init__(self, config: ControlConfig, first: bool):
        super().__init__(config)
        if first:
            self.before_proj: Linear = Linear(config.dim, config.dim)
        self.after_proj: Linear = Linear(config.dim, config.dim)
