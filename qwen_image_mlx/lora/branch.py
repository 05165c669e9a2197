"""Unmerged LoRAs: a low-rank branch that runs with a linear layer."""

from __future__ import annotations

import mlx.core as mx

from ..models import nn
from ..weights.changes import Branch
from ..weights.loader import place_of


class SideBranch(nn.Module):
    """A linear layer with a low-rank branch: y = layer(x) + (x A^T) B^T.

    Args:
        layer: dense or quantized, (…, in) to (…, out).
        a: (r, in), in the dtype of the activations.
        b: (out, r), in the same dtype.
    """

    def __init__(self, layer: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.layer: nn.Module = layer
        self.a: mx.array = a
        self.b: mx.array = b

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + (x @ self.a.T) @ self.b.T

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """The layer's terms (…, out), whose sum is the output, with the branch added to the first."""
        first, *bias = self.layer.terms(x)
        return (first + (x @ self.a.T) @ self.b.T, *bias)


def attach_branch(module: nn.Module, path: str, branch: Branch | None) -> None:
    """Attaches a low-rank branch to the layer at `path`, replacing an earlier branch; None removes it."""
    parent, place = place_of(module, path)
    layer = parent[place].layer if isinstance(parent[place], SideBranch) else parent[place]
    parent[place] = layer if branch is None else SideBranch(layer, *branch)
