"""The table of probed operations; for each kind, how it is computed and compared.

A kind is a function of a name (of its numbers), a shape and a dtype. It computes on the default device, and returns
pairs of what came out and what is right, both fp32: right is the same in fp32 on the CPU stream, or NumPy's float64,
from inputs that are rounded to the dtype first. Of large results some rows are compared, and for products the sum of
all rows too, so that garbage anywhere is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..models.layers import gated_add, gelu_tanh, rotate_half, turns
from ..models.qwen_image.rope import THETA, Segment, rotary_tables
from ..models.qwen_image.transformer import EPS
from ..models.rotary import rotate
from ..weights.quantize import quantize_matrix
from ..weights.schemes import Scheme
from .measure import numbers, tolerance_of
from .values import array

Pairs = list[tuple[np.ndarray, np.ndarray]]
Shape = tuple[int, ...]
Kind = Callable[[str, Shape, mx.Dtype], Pairs]
_ROWS = 64  # compared of a large result
_QUERIES = 32
_BF16, _FP16, _FP32 = mx.bfloat16, mx.float16, mx.float32


class Operation(NamedTuple):
    """A row of the table.

    Attributes:
        name: its name in a report.
        kind: computes it.
        large: its shape in the released models at 1024x1024, or of one head or band there.
        small: its shape on a CPU.
        dtype: of its inputs.
        tolerance: maximum relative error; None is the default of the dtype.
        cpu: dtype on a CPU, if different: MLX's  CPU kernels for packed matrices and attention add up in bf16.
    """

    name: str
    kind: Kind
    large: Shape
    small: Shape
    dtype: mx.Dtype
    tolerance: float | None = None
    cpu: mx.Dtype | None = None

    @property
    def allowed(self) -> float:
        """The maximum relative error on this machine."""
        return tolerance_of(self.dtype, self.tolerance)


def spread(count: int, maximum: int) -> np.ndarray:
    """At most `maximum` of `count` indices, whose distances are odd, so that they fall on all places in a tile."""
    step = max(1, count // maximum) | 1
    return np.arange(0, count, step)


def product(x: mx.array, w: mx.array, y: mx.array, bias: mx.array | None = None) -> Pairs:
    """Pairs for y = x w^T (+ bias), x (M, K), w (N, K): some rows, and the sum of all rows."""
    rows = spread(x.shape[0], _ROWS)
    wide = numbers(x)
    picked = np.concatenate([wide[rows], wide.sum(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)])
    del wide
    with mx.stream(mx.cpu):
        right = numbers(mx.array(picked) @ w.astype(mx.float32).T)
    if bias is not None:
        right = right + numbers(bias) * np.r_[np.ones(len(rows)), x.shape[0]][:, None].astype(np.float32)
    got = numbers(y)
    return [(got[rows], right[:-1]), (got.sum(axis=0, dtype=np.float64, keepdims=True).astype(np.float32), right[-1:])]


def gemm(name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """A linear layer: (M, K) times (N, K) transposed, plus a bias; shape is (M, K, N)."""
    m, k, n = shape
    x, w, bias = array("x" + name, (m, k), dtype), array("w" + name, (n, k), dtype, k**-0.5), array("b", (n,), dtype)
    return product(x, w, mx.addmm(bias, x, w.T), bias)


def quantized(mode: str, bits: int, group: int, name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """A linear layer with a quantized matrix, without bias; shape is (M, K, N); packed on the CPU."""
    m, k, n = shape
    x = array("x" + name, (m, k), dtype)
    with mx.stream(mx.cpu):
        packed = mx.quantize(array("w" + name, (n, k), mx.float32, k**-0.5), group, bits, mode)
        w = mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        mx.eval(packed, w)
    scales = [part.astype(dtype) if part.dtype == mx.float32 else part for part in packed[1:]]
    if scales[0].dtype == dtype:  # affine: what is right follows from the rounded scales
        with mx.stream(mx.cpu):
            wide = [scale.astype(mx.float32) for scale in scales]
            w = mx.dequantize(packed[0], *wide, group_size=group, bits=bits, mode=mode)
    y = mx.quantized_matmul(x, packed[0], *scales, transpose=True, group_size=group, bits=bits, mode=mode)
    return product(x, w, y)


def packing(mode: str, bits: int, group: int, ours: bool, name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """`mx.quantize`, or our own quantizer, unpacked again on the CPU; against the same packed on the CPU."""

    def unpacked() -> tuple[mx.array, ...]:
        w = array("w" + name, shape, dtype)
        if ours:
            packed = quantize_matrix(w, Scheme(mode, bits, group))
            return packed.weight, packed.scales, packed.biases
        return tuple(mx.quantize(w, group, bits, mode))

    def opened(parts: tuple[mx.array, ...]) -> np.ndarray:
        with mx.stream(mx.cpu):
            wide = [part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in parts]
            return numbers(mx.dequantize(*wide, group_size=group, bits=bits, mode=mode))

    here = unpacked()
    mx.eval(here)
    mx.synchronize()
    with mx.stream(mx.cpu):
        there = unpacked()
    return [(opened(here), opened(there))]


def unpacking(mode: str, bits: int, group: int, name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """`mx.dequantize` against the same on the CPU."""
    with mx.stream(mx.cpu):
        packed = mx.quantize(array("w" + name, shape, dtype), group, bits, mode)
        right = numbers(mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, dtype=dtype))
    return [(numbers(mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, dtype=dtype)), right)]


def attention(heads: int, mask: str, name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """Fused attention; shape is (query heads, tokens, channels); mask is "", "causal" or "padding" (a last quarter)."""
    count, tokens, size = shape
    q, k, v = (array(x + name, (1, n, tokens, size), dtype) for x, n in (("q", count), ("k", heads), ("v", heads)))
    argument: Any = mask or None
    added = np.zeros((tokens, tokens), np.float32)
    if mask == "causal":
        added[np.triu_indices(tokens, 1)] = -np.inf
    if mask == "padding":
        added[:, -tokens // 4 :] = -np.inf
        argument = mx.array(added[:1]).astype(dtype)[None, None]
    got = numbers(mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=argument))[0]
    rows = spread(tokens, _QUERIES)
    q, k, v = (numbers(x)[0] for x in (q, k, v))
    k, v = (np.repeat(x, count // heads, axis=0) for x in (k, v))
    scores = q[:, rows] @ k.transpose(0, 2, 1) * np.float32(size**-0.5) + added[rows]
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return [(got[:, rows], (weights / weights.sum(axis=-1, keepdims=True)) @ v)]


def convolution(stride: int, name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """A 3x3 convolution; shape is (rows, columns, channels in, channels out). Compared with nine products."""
    height, width, cin, cout = shape
    x = array("x" + name, (1, height, width, cin), dtype)
    w = array("w" + name, (cout, 3, 3, cin), dtype, (9 * cin) ** -0.5)
    y = numbers(mx.conv2d(x, w, stride=stride, padding=1))[0]
    padded, w = np.pad(numbers(x)[0], ((1, 1), (1, 1), (0, 0))), numbers(w)
    tops = spread(y.shape[0], _ROWS // 8)
    right = np.zeros((len(tops), y.shape[1], cout), np.float32)
    for down in range(3):
        for across in range(3):
            taken = padded[stride * tops + down][:, across : across + stride * y.shape[1] : stride]
            with mx.stream(mx.cpu):
                right += numbers(mx.array(taken) @ mx.array(w[:, down, across]).T)
    return [(y[tops], right)]


def elementwise(
    fn: Callable[..., mx.array], right: Callable[..., np.ndarray], name: str, shape: Shape, dtype: mx.Dtype
) -> Pairs:
    """A function of three arrays, or as many as it takes: against its formula in float64."""
    inputs = [array(f"{n}{name}", shape[-1:] if n == 1 else shape, dtype) for n in range(right.__code__.co_argcount)]
    return [(numbers(fn(*inputs)), right(*(numbers(x).astype(np.float64) for x in inputs)))]


def gelu_formula(x: np.ndarray) -> np.ndarray:
    """tanh-GELU."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gate_formula(x: np.ndarray, gate: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + gate y."""
    return x + gate * y


def softmax_formula(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    grown = np.exp(x - x.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def rms_formula(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMS norm over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def layer_formula(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Layer norm over the last axis, with the weight as bias too."""
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + EPS) * weight + weight


def silu_formula(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x / (1 + np.exp(-x))


def turning(name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """`rotate` with the tables of a square image; shape is (side of its grid, heads, channels)."""
    side, heads, size = shape
    axes = (size // 8, size // 16 * 7, size // 16 * 7)
    x = array("x" + name, (1, side * side, heads, size), dtype)
    got = numbers(rotate(x, *rotary_tables([Segment(0, side, side)], 0, axes)))
    at = np.arange(side) - (side - side // 2)
    position = np.stack(np.broadcast_arrays(0, at[:, None], at[None]), axis=-1).reshape(-1, 3)
    frequencies = [THETA ** (-np.arange(0, channels, 2) / channels) for channels in axes]
    angles = np.concatenate([p[:, None] * f for p, f in zip(position.T, frequencies, strict=True)], axis=1)
    pairs = numbers(x)[0].astype(np.float64).reshape(side * side, heads, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    return [(got[0], np.stack([turned.real, turned.imag], axis=-1).reshape(got[0].shape))]


def turning_half(name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """`rotate_half`; shape is (heads, tokens, channels)."""
    tables = turns(array("angles", (shape[1], shape[2] // 2), _FP32, 3.0), axis=-2, dtype=dtype)
    x = array("x" + name, shape, dtype)
    (cos, sin), (a, b) = (
        np.split(numbers(y).astype(np.float64), 2, axis=axis) for y, axis in ((tables[0], -2), (x, -1))
    )
    cos, sin = cos[:, 0], sin[:, 0]
    right = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return [(numbers(rotate_half(x, *tables)), right)]


def taking(name: str, shape: Shape, dtype: mx.Dtype) -> Pairs:
    """Rows by index, as windows and embeddings are gathered; shape is (rows, columns, indices)."""
    rows, columns, count = shape
    index = np.arange(count, dtype=np.int64) * 7919 % rows
    x = array("x" + name, (rows, columns), dtype)
    return [(numbers(mx.take(x, mx.array(index), axis=0)), numbers(x)[index])]


_softmax = partial(elementwise, partial(mx.softmax, axis=-1, precise=True), softmax_formula)
_rms_norm = partial(elementwise, lambda x, w: mx.fast.rms_norm(x, w, EPS), rms_formula)
_layer_norm = partial(elementwise, lambda x, w: mx.fast.layer_norm(x, w, w, EPS), layer_formula)
_silu = partial(elementwise, mx.compile(lambda x: x * mx.sigmoid(x)), silu_formula)
_gelu = partial(elementwise, gelu_tanh, gelu_formula)
_gelu_bias = partial(elementwise, gelu_tanh, lambda x, bias: gelu_formula(x + bias))
_gate = partial(elementwise, gated_add, gate_formula)
_PACKED, _FEW = (1024, 3072, 3072), (16, 768, 64)
_MATRIX, _SMALL = (1024, 3072), (64, 768)
OPERATIONS = (
    Operation("gemm-bf16-3072", gemm, (4096, 3072, 3072), (64, 512, 64), _BF16),
    Operation("gemm-bf16-2048", gemm, (1024, 2048, 2048), (64, 2048, 64), _BF16),
    Operation("gemm-bf16-12288", gemm, (4096, 12288, 3072), (16, 12288, 32), _BF16),
    Operation("gemm-bf16-18944", gemm, (4096, 18944, 3584), (16, 18944, 32), _BF16),
    Operation("gemm-bf16-text", gemm, (200, 3072, 3072), (20, 768, 64), _BF16),
    Operation("gemm-bf16-out", gemm, (4096, 3072, 64), (64, 768, 64), _BF16),
    Operation("gemm-bf16-in", gemm, (4096, 64, 3072), (64, 64, 768), _BF16),
    Operation("gemm-fp16-3072", gemm, (1024, 3072, 3072), (64, 512, 64), _FP16),
    Operation("gemm-fp32-3072", gemm, (1024, 3072, 3072), (64, 3072, 64), _FP32),
    Operation("quantized-4", partial(quantized, "affine", 4, 64), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantized-6", partial(quantized, "affine", 6, 64), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantized-8", partial(quantized, "affine", 8, 64), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantized-mxfp4", partial(quantized, "mxfp4", 4, 32), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantized-mxfp8", partial(quantized, "mxfp8", 8, 32), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantized-nvfp4", partial(quantized, "nvfp4", 4, 16), _PACKED, _FEW, _BF16, cpu=_FP32),
    Operation("quantize-4", partial(packing, "affine", 4, 64, False), _MATRIX, _SMALL, _FP32, 5e-3),
    Operation("quantize-mxfp4", partial(packing, "mxfp4", 4, 32, False), _MATRIX, _SMALL, _FP32, 5e-3),
    Operation("quantize-own-4", partial(packing, "affine", 4, 64, True), _MATRIX, _SMALL, _FP32, 5e-3),
    Operation("quantize-own-8", partial(packing, "affine", 8, 64, True), _MATRIX, _SMALL, _FP32, 5e-3),
    Operation("dequantize-4", partial(unpacking, "affine", 4, 64), _MATRIX, _SMALL, _BF16),
    Operation("attention-image", partial(attention, 24, ""), (24, 1100, 128), (24, 65, 128), _BF16, cpu=_FP32),
    Operation("attention-window", partial(attention, 16, "padding"), (16, 256, 80), (16, 64, 80), _BF16, cpu=_FP32),
    Operation("attention-causal", partial(attention, 4, "causal"), (28, 300, 128), (28, 65, 128), _BF16, cpu=_FP32),
    Operation("attention-fp32", partial(attention, 24, ""), (24, 300, 128), (24, 65, 128), _FP32),
    Operation("attention-vae", partial(attention, 1, ""), (1, 1024, 384), (1, 144, 384), _FP32),
    Operation("convolution-384", partial(convolution, 1), (128, 128, 384, 384), (6, 12, 384, 384), _FP32, 1e-4),
    Operation("convolution-192", partial(convolution, 1), (128, 256, 192, 192), (12, 12, 192, 192), _FP32, 1e-4),
    Operation("convolution-96", partial(convolution, 1), (128, 512, 96, 96), (12, 24, 96, 96), _FP32, 1e-4),
    Operation("convolution-in", partial(convolution, 1), (128, 128, 16, 384), (12, 12, 16, 384), _FP32, 1e-4),
    Operation("convolution-out", partial(convolution, 1), (256, 256, 96, 3), (12, 12, 96, 3), _FP32, 1e-4),
    Operation("convolution-halving", partial(convolution, 2), (256, 256, 96, 96), (12, 12, 96, 96), _FP32, 1e-4),
    Operation("take", taking, (5476, 1280, 6400), (144, 80, 256), _BF16, 1e-6),
    Operation("softmax", _softmax, (1024, 16384), (64, 512), _FP32),
    Operation("rms-norm", _rms_norm, (98304, 128), (512, 128), _BF16),
    Operation("layer-norm", _layer_norm, (4096, 3072), (64, 3072), _BF16),
    Operation("silu", _silu, (1024, 18944), (64, 512), _BF16),
    Operation("gelu", _gelu, (1024, 12288), (64, 3072), _BF16),
    Operation("gelu-bias", _gelu_bias, (1024, 12288), (64, 3072), _BF16),
    Operation("gate", _gate, (4096, 3072), (64, 3072), _BF16),
    Operation("rotate", turning, (64, 24, 128), (8, 24, 128), _BF16),
    Operation("rotate-half", turning_half, (28, 300, 128), (28, 40, 128), _BF16),
    Operation("rotate-half-fp32", turning_half, (16, 5476, 80), (16, 64, 80), _FP32),
)
