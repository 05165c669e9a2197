"""Layers that models share.

MLX's own are born with zeros here: a checkpoint fills them, so building a model draws nothing from the application's
global random state, which MLX's initialisers would advance.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Protocol

import mlx.core as mx

from . import nn

# `turns`' result.
Turns = tuple[mx.array, mx.array]
# Called after each layer with the arrays it made, so that the caller can evaluate them meanwhile.
OnLayer = Callable[[Sequence[mx.array]], None]


class Relay(Protocol):
    """The way of a model's streams between the blocks that run here and those that run elsewhere.

    Attributes:
        blocks: the numbers of those that run here.
    """

    blocks: range

    def receive(self, block: int, streams: Sequence[mx.array]) -> list[mx.array]:
        """What enters a block here: (B, tokens, D), of the shapes and dtype of these streams.

        These come back unless it is the first block here and others run before it.
        """

    def send(self, block: int, streams: Sequence[mx.array]) -> None:
        """Takes the streams (B, tokens, D) to a block that comes after those here, if it is that one."""


def here(numbers: range, relay: Relay | None) -> range:
    """Those of some consecutive blocks that run here, by their numbers."""
    if relay is None:
        return numbers
    return range(max(numbers.start, relay.blocks.start), min(numbers.stop, relay.blocks.stop))


# Maximum work of one attention kernel, in FLOP: macOS ends a process whose kernel holds the GPU for seconds, and
# this takes a quarter of a second on an M1 of 8 cores (modelled).
ATTENTION_FLOP = 5e11
_ROWS = 64  # queries that Metal's attention kernels treat together, in multiples


class Linear(nn.Linear):
    """`nn.Linear` without random initialisation."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        nn.Module.__init__(self)
        self.weight: mx.array = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias: mx.array = mx.zeros((output_dims,))

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """The arrays (…, out) whose sum is the layer's output: here the output itself."""
        return (self(x),)


class Embedding(nn.Embedding):
    """`nn.Embedding` without random initialisation."""

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight: mx.array = mx.zeros((num_embeddings, dims))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a 3x3 kernel and a bias, without random initialisation; weight (out, 3, 3, in)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1):
        nn.Module.__init__(self)
        self.weight: mx.array = mx.zeros((out_channels, 3, 3, in_channels))
        self.bias: mx.array = mx.zeros((out_channels,))
        self.stride: int = stride
        self.padding: int = padding
        self.dilation: int = 1
        self.groups: int = 1


class QuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` around existing weights.

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
        self.weight: mx.array = weight
        self.scales: mx.array = scales
        if biases is not None:
            self.biases = biases
        if bias is not None:
            self.bias = bias
        self.group_size: int = group_size
        self.bits: int = bits
        self.mode: str = mode

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """The product (…, out), and the bias (out,): adding it here would take a separate kernel."""
        product = mx.quantized_matmul(
            x, self.weight, self.scales, self.get("biases"), True, self.group_size, self.bits, self.mode
        )
        return (product, self.bias) if "bias" in self else (product,)


class QuantizedEmbedding(QuantizedLinear):
    """`nn.QuantizedEmbedding` around existing weights; rows come out in `dtype`."""

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
        self.gate_proj: Linear = Linear(dim, inner, bias)
        self.up_proj: Linear = Linear(dim, inner, bias)
        self.down_proj: Linear = Linear(inner, dim, bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def turns(angles: mx.array, axis: int, dtype: mx.Dtype = mx.float32) -> Turns:
    """The tables that rotate a channel pair by its angle: (cos, sin) and (-sin, cos).

    Args:
        angles: (…, head_dim / 2), fp32.
        axis: where the new axis of two goes, as the pairs lie in a head: -1 for neighbours, -2 for halves.
        dtype: of the tables and the products.
    """
    cos, sin = mx.cos(angles), mx.sin(angles)
    return tuple(mx.stack(pair, axis=axis).astype(dtype) for pair in ([cos, sin], [-sin, cos]))


def rotate_half(x: mx.array, real: mx.array, imag: mx.array) -> mx.array:
    """Turns channel pairs (j, j + head_dim / 2) of x (…, head_dim) by tables that broadcast to (…, 2, head_dim / 2)."""
    pairs = x.reshape(*x.shape[:-1], 2, -1)
    return turn(pairs[..., :1, :], pairs[..., 1:, :], real, imag).reshape(x.shape)


@mx.compile
def turn(first: mx.array, second: mx.array, real: mx.array, imag: mx.array) -> mx.array:
    """first * real + second * imag, in the tables' dtype, rounded to first's.

    Either half of the pairs is a view that both halves of the result read, so that the whole is one kernel.
    """
    return (first.astype(real.dtype) * real + second.astype(imag.dtype) * imag).astype(first.dtype)


def periods(theta: float, dim: int) -> mx.array:
    """theta ** (2 j / dim) for the channel pairs j of a head: fp32 (dim / 2,); angles are positions divided by them.

    Made on the host: Metal's power is good to 16 units in the last place only, which large positions multiply.
    """
    return mx.array([theta**exponent for exponent in array("f", (n / dim for n in range(0, dim, 2)))])


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Scaled dot-product attention without a mask, in as few kernels as `ATTENTION_FLOP` allows.

    Each query has its own result, so the rows of queries may be split: the numbers stay the same.

    Args:
        q: (B, L, heads, head_dim).
        k, v: (B, S, heads, head_dim).

    Returns:
        (B, L, heads * head_dim).
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    length, flop_of_row = q.shape[2], 4 * q.size // q.shape[2] * k.shape[2]
    rows = max(_ROWS, int(ATTENTION_FLOP / flop_of_row) // _ROWS * _ROWS)
    out = [
        mx.fast.scaled_dot_product_attention(q[:, :, top : top + rows], k, v, scale=q.shape[-1] ** -0.5)
        .transpose(0, 2, 1, 3)
        .flatten(2)
        for top in range(0, length, rows)
    ]
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=1)


@mx.compile
def gated_add(x: mx.array, gate: mx.array, *terms: mx.array) -> mx.array:
    """x + gate * (the terms' sum); in float16 held inside its range, as the reference does after each block."""
    out = x + gate * reduce(mx.add, terms)
    return mx.clip(out, -65504, 65504) if x.dtype == mx.float16 else out


@mx.compile
def gelu_tanh(*terms: mx.array) -> mx.array:
    """x / 2 * (1 + tanh(z)) with z = sqrt(2 / pi) * (x + 0.044715 x**3), in fp32, rounded once; x is the terms' sum.

    Written as x / (1 + exp(-2 z)), which is the same and takes less than half the time where tanh is slow. The exponent
    ends at 80, where the result is 0 to 34 digits: past 88 the exponential is infinite, and its gradient not a number.
    MLX makes one kernel of at most eleven operations in a row, and this uses all eleven.
    """
    x = reduce(mx.add, terms)
    wide = x.astype(mx.float32)
    exponent = -2 * math.sqrt(2 / math.pi) * (wide + (0.044715 * wide) * (wide * wide))
    return (wide / (1 + mx.exp(mx.minimum(exponent, 80)))).astype(x.dtype)
