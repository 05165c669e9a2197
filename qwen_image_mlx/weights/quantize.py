"""Quantizes matrices: which ones, into which form, and better than `mx.quantize` at equal size.

Affine: w ≈ scale · q + bias for each group of consecutive columns. Scale and bias are rounded to bf16 before the
elements are chosen, so that no rounding is left over; then they are refitted by least squares to the elements, which
are chosen again, while that helps. They are bf16 whatever the dtype of a run, so that a saved checkpoint and a run
have the same numbers. The microscaling modes are MLX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from ..gpu import number
from .packed import Packed
from .schemes import Scheme

REFITS = 6
SCALES: mx.Dtype = mx.bfloat16
_BAND = 1 << 21  # elements quantized at once: 8 MiB in fp32, a refit takes about fifteen times that


def quantize_matrix(w: mx.array, scheme: Scheme, refits: int = REFITS) -> Packed:
    """A matrix in a scheme's form, evaluated band by band.

    Args:
        w: (rows, columns), floating, possibly lazy.
        scheme: one that `fits`.
        refits: maximum number of least-squares refits; 0 is min-max quantization with rounded scales.

    Returns:
        The (rows, columns) matrix in the form `mx.quantized_matmul` takes.
    """
    rows = max(1, _BAND // w.shape[1])
    bands = []
    for top in range(0, w.shape[0], rows):
        band = w[top : top + rows].astype(mx.float32)
        if scheme.mode == "affine":
            parts = _affine(band, scheme, refits)
        else:
            parts = mx.quantize(band, scheme.group_size, scheme.bits, scheme.mode)
        mx.eval(parts)
        bands.append(parts)
    weight, scales, *biases = (mx.concatenate(list(parts)) for parts in zip(*bands, strict=True))
    mx.eval(weight, scales, biases)
    return Packed(weight, scales, biases[0] if biases else None, scheme.group_size, scheme.bits, scheme.mode)


def relative_error(w: mx.array, packed: Packed) -> float:
    """|w - w'| / |w| in the Frobenius norm, of a matrix and its quantized form."""
    w = w.astype(mx.float32)
    return float(number(mx.linalg.norm(w - packed.dequantize()) / mx.maximum(mx.linalg.norm(w), 1e-30)))


def _affine(w: mx.array, scheme: Scheme, refits: int) -> tuple[mx.array, mx.array, mx.array]:
    groups = w.reshape(w.shape[0], -1, scheme.group_size)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    levels, slack = 2**scheme.bits - 1, mx.finfo(SCALES).eps / 2
    # Widened by the maximum rounding error, so that both ends stay representable.
    bias = (low - slack * mx.abs(low)).astype(SCALES).astype(mx.float32)
    scale, bias = _round(mx.maximum((high - bias) / levels * (1 + slack), 1e-12), bias)
    q = _elements(groups, scale, bias, levels)
    error = _error(groups, q, scale, bias)
    for _ in range(refits):
        q, scale, bias, error = fused(_refit)(groups, q, scale, bias, error, levels)
    columns = w.shape[1]
    return (
        fused(_pack)(q.astype(mx.uint32).reshape(-1, columns), scheme.bits),
        scale.reshape(w.shape[0], -1).astype(SCALES),
        bias.reshape(w.shape[0], -1).astype(SCALES),
    )


def _refit(
    groups: mx.array, q: mx.array, scale: mx.array, bias: mx.array, error: mx.array, levels: int
) -> tuple[mx.array, ...]:
    """Elements, scale, bias and error of each group after a refit, where that is better."""
    # Least squares of w over q, for each group: scale = cov(q, w) / var(q).
    mean_q, mean_w = q.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    variance = mx.square(q - mean_q).mean(axis=-1, keepdims=True)
    covariance = ((q - mean_q) * (groups - mean_w)).mean(axis=-1, keepdims=True)
    slope = mx.where(variance > 0, covariance / mx.maximum(variance, 1e-12), scale)
    new_scale, new_bias = _round(slope, mean_w - slope * mean_q)
    new_q = _elements(groups, new_scale, new_bias, levels)
    new_error = _error(groups, new_q, new_scale, new_bias)
    better = new_error < error
    return tuple(
        mx.where(better, new, old)
        for new, old in ((new_q, q), (new_scale, scale), (new_bias, bias), (new_error, error))
    )


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its elementwise operations fused into few kernels, bit-identical; on a CPU the function itself.

    On a GPU each kernel costs a pass over memory; on a CPU compiling them takes longer than they save.
    """
    return _compile(function) if mx.default_device() == mx.gpu else function


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return mx.compile(function)


def _round(scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return scale.astype(SCALES).astype(mx.float32), bias.astype(SCALES).astype(mx.float32)


def _elements(w: mx.array, scale: mx.array, bias: mx.array, levels: int) -> mx.array:
    safe = mx.where(scale == 0, 1, scale)
    return mx.clip(mx.round((w - bias) / safe), 0, levels)


def _error(w: mx.array, q: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return mx.square(scale * q + bias - w).sum(axis=-1, keepdims=True)


def _pack(q: mx.array, bits: int) -> mx.array:
    """uint32 elements (rows, columns) to the words of a bit stream (rows, columns * bits / 32), little-endian."""
    q = q.reshape(q.shape[0], -1, 32)
    words = [mx.zeros(q.shape[:2], dtype=mx.uint32) for _ in range(bits)]
    for n in range(32):
        word, shift = divmod(n * bits, 32)
        words[word] = words[word] | (q[..., n] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (q[..., n] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(q.shape[0], -1)
