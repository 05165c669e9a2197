"""Layers that models share.

MLX's own are born with zeros here: a checkpoint fills them, so building a model draws nothing from the application's
global random state, which MLX's initialisers would advance.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Linear(nn.Linear):
    """`nn.Linear` without random initialisation."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        nn.Module.__init__(self)
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))


class Embedding(nn.Embedding):
    """`nn.Embedding` without random initialisation."""

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a 3x3 kernel and a bias, without random initialisation; weight (out, 3, 3, in)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_channels, 3, 3, in_channels))
        self.bias = mx.zeros((out_channels,))
        self.stride, self.padding, self.dilation, self.groups = stride, padding, 1, 1


class QuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` around weights that are there already.

    Args:
        weight, scales, biases: as `mx.quantize` returns them; biases None outside the mode "affine".
        group_size, bits, mode: as `mx.quantize` takes them.
        bias: (out,), or None.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        group_size: int,
        bits: int,
        mode: str,
        bias: mx.array | None = None,
    ):
        nn.Module.__init__(self)
        self.weight, self.scales = weight, scales
        if biases is not None:
            self.biases = biases
        if bias is not None:
            self.bias = bias
        self.group_size, self.bits, self.mode = group_size, bits, mode


class SideBranch(nn.Module):
    """A linear layer with a low-rank branch beside it: y = layer(x) + (x A^T) B^T.

    Args:
        layer: dense or quantized.
        a: (r, in).
        b: (out, r).
    """

    def __init__(self, layer: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.layer, self.a, self.b = layer, a, b

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + (x @ self.a.T) @ self.b.T


class QuantizedEmbedding(QuantizedLinear):
    """`nn.QuantizedEmbedding` around weights that are there already; rows come out in `dtype`."""

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        group_size: int,
        bits: int,
        mode: str,
        dtype: mx.Dtype,
    ):
        super().__init__(weight, scales, biases, group_size, bits, mode)
        self._dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        biases = self.get("biases")
        return mx.dequantize(
            self.weight[ids], self.scales[ids], None if biases is None else biases[ids],
            self.group_size, self.bits, self.mode, dtype=self._dtype,
        )  # fmt: skip


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(dim, inner, bias)
        self.up_proj = Linear(dim, inner, bias)
        self.down_proj = Linear(inner, dim, bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


@mx.compile
def rotate_half(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turns channel pairs (j, j + head_dim / 2) of x (…, head_dim) by angles that broadcast to half of it."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
