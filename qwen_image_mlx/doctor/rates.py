"""The speed of an image's operations, best of three, and the time an image will take at these rates.

`RATES` is the table; to add an operation, add a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu import finish
from ..models.layers import gelu_tanh
from ..models.qwen_image.config import TransformerConfig
from ..models.qwen_image.transformer import EPS
from .chip import nominal_tflops
from .measure import on_gpu, on_metal, seconds_of
from .outcome import Outcome
from .values import array

# (shape, dtype) -> the function to time, and its work: FLOP, or bytes moved.
Prepare = Callable[[tuple[int, ...], mx.Dtype], tuple[Callable[[], Any], float]]
_SLOW = 0.4  # share of the nominal speed; 0.8 is usual
_SLOW_CPU = 5.0  # GFLOP/s in fp32, below which only MLX's own BLAS is
# Bytes that a block moves outside products and attention, per token, element and byte of the stream: modelled for 4296
# tokens, in which it is 1.0 GB.
_OTHER_TRAFFIC = 38
_TEXT = 200  # tokens of a prompt
_GRAPH = 2000


class Rate(NamedTuple):
    """A row of the table.

    Attributes:
        name: its name, without the unit.
        prepare: makes the inputs.
        large: its shape on a GPU.
        small: its shape on a CPU.
        dtype: of its inputs.
        unit: "gflops" or "gbs".
    """

    name: str
    prepare: Prepare
    large: tuple[int, ...]
    small: tuple[int, ...]
    dtype: mx.Dtype
    unit: str = "gflops"


def run(options: Mapping[str, Any]) -> Outcome:
    """Times every row, then the overheads: allocation, launches, graphs."""
    outcome = Outcome()
    for rate in RATES:
        fn, work = rate.prepare(rate.large if on_gpu() else rate.small, rate.dtype)
        outcome.figures[f"{rate.name}_{rate.unit}"] = work / seconds_of(fn) / 1e9
        del fn
        mx.clear_cache()
    outcome.figures |= _around()
    rates = outcome.figures
    seconds = pass_seconds(TransformerConfig(), 4096, rates)
    rates["pass_1024_s"] = seconds
    rates["faster_at_4_bits"] = max(("quantized_4", "unpacked_4"), key=lambda name: rates[f"{name}_gflops"])
    projection = (
        f"1024x1024: {duration(seconds)} a pass, 8 steps of Lightning: {duration(8 * seconds)}, 50 guided steps: "
        f"{duration(100 * seconds)} (modelled from these rates)"
    )
    rate = rates["gemm_bf16_gflops"]
    outcome.summary = f"{f'{rate / 1e3:.3g} T' if rate >= 1e3 else f'{rate:.3g} G'}FLOP/s in bf16; {projection}"
    _judge(outcome)
    return outcome


def _judge(outcome: Outcome) -> None:
    rates, nominal = outcome.figures, nominal_tflops() if on_metal() else None
    if nominal:
        rates["nominal_gflops"] = 1000 * nominal
        rates["of_nominal_ratio"] = share = rates["gemm_bf16_gflops"] / 1000 / nominal
        if share < _SLOW:
            outcome.find(
                "slow",
                f"products reach {share:.0%} of what this chip can do; close other programs, plug the charger in, let "
                f"it cool down, and run again ({outcome.summary})",
            )
    if not on_gpu() and rates["gemm_fp32_gflops"] < _SLOW_CPU:
        outcome.summary += "; MLX's own BLAS is slow, preload OpenBLAS (see README)"


def pass_seconds(config: TransformerConfig, tokens: int, rates: Mapping[str, float]) -> float:
    """Seconds of one pass without guidance, modelled: products and attention at their rates, and other traffic.

    Each block has 12 D^2 weights a token (4 of attention's, 8 of the MLP's), two FLOP each, and 4 L^2 D FLOP of
    attention.

    Args:
        config: of the transformer.
        tokens: of the image; a prompt's are added.
        rates: figures of this group.
    """
    length, dim = tokens + _TEXT, config.dim
    products = 24 * dim**2 * length
    seconds = products / 3 / rates["gemm_bf16_gflops"] + products * 2 / 3 / rates["gemm_bf16_deep_gflops"]
    seconds += 4 * length**2 * dim / rates["attention_gflops"]
    seconds += _OTHER_TRAFFIC * length * dim * 2 / rates["copy_gbs"]
    return config.num_layers * seconds / 1e9


def product_rate() -> float:
    """FLOP/s of large 16-bit products on this machine: four fifths of the chip's nominal rate, or timed in a moment.

    Elsewhere than on Apple's GPU a product of fp32 is timed, as 16-bit ones are not what a CPU is fast at.
    """
    nominal = nominal_tflops() if on_metal() else None
    if nominal:
        return 0.8e12 * nominal
    side = 1024 if on_gpu() else 256  # a CPU without a fast BLAS takes seconds for a large one
    fn, work = _product((side, side, side), mx.bfloat16 if on_gpu() else mx.float32)
    return work / seconds_of(fn)


def duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _around() -> dict[str, float]:
    count, one = (16 << 20) if on_gpu() else (4 << 20), mx.array(1.0)
    fill = partial(mx.full, (count,), 1.0)

    def fresh() -> mx.array:
        mx.clear_cache()
        return fill()

    figures = {
        "fresh_memory_gbs": 4 * count / seconds_of(fresh) / 1e9,
        "cached_memory_gbs": 4 * count / seconds_of(fill) / 1e9,
        "launch_s": seconds_of(lambda: one + 1, 20),
    }
    start, x = time.perf_counter(), one
    for _ in range(_GRAPH):
        x = x + 1
    figures["graph_of_2000_s"] = time.perf_counter() - start
    finish(x)
    return figures


def _product(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[Callable[[], Any], float]:
    m, k, n = shape
    x, w = array("x", (m, k), dtype), array("w", (n, k), dtype)
    return lambda: x @ w.T, 2.0 * m * k * n


def _packed(bits: int, unpack: bool, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[Callable[[], Any], float]:
    m, k, n = shape
    x, w = array("x", (m, k), dtype), mx.quantize(array("w", (n, k), dtype), 64, bits)
    finish(x, w)
    if unpack:
        return lambda: x @ mx.dequantize(*w, group_size=64, bits=bits, dtype=dtype).T, 2.0 * m * k * n
    return lambda: mx.quantized_matmul(x, *w, transpose=True, group_size=64, bits=bits), 2.0 * m * k * n


def _attention(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[Callable[[], Any], float]:
    heads, tokens, size = shape
    q, k, v = (array(name, (1, *shape), dtype) for name in "qkv")
    fn = partial(mx.fast.scaled_dot_product_attention, q, k, v, scale=size**-0.5)
    return fn, 4.0 * heads * tokens**2 * size


def _convolution(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[Callable[[], Any], float]:
    side, channels = shape
    x, w = array("x", (1, side, side, channels), dtype), array("w", (channels, 3, 3, channels), dtype)
    return lambda: mx.conv2d(x, w, padding=1), 18.0 * side**2 * channels**2


def _passing(
    fn: Callable[[mx.array], mx.array], shape: tuple[int, ...], dtype: mx.Dtype
) -> tuple[Callable[[], Any], float]:
    x = array("x", shape, dtype)
    return lambda: fn(x), 2.0 * x.nbytes  # read once and written once


_BF16, _FP16, _FP32 = mx.bfloat16, mx.float16, mx.float32
_WIDE, _DEEP, _FEW = (4096, 3072, 3072), (4096, 12288, 3072), (64, 512, 512)
_STREAM, _ROWS = (4096, 12288), (256, 3072)
_copy = partial(_passing, lambda x: x + 0)
_norm = partial(_passing, lambda x: mx.fast.layer_norm(x, None, None, EPS))
RATES = (
    Rate("gemm_bf16", _product, _WIDE, _FEW, _BF16),
    Rate("gemm_bf16_deep", _product, _DEEP, (16, 2048, 512), _BF16),
    Rate("gemm_fp16", _product, _WIDE, _FEW, _FP16),
    Rate("gemm_fp32", _product, (1024, 3072, 3072), _FEW, _FP32),
    Rate("quantized_4", partial(_packed, 4, False), _WIDE, _FEW, _BF16),
    Rate("quantized_8", partial(_packed, 8, False), _WIDE, _FEW, _BF16),
    Rate("unpacked_4", partial(_packed, 4, True), _WIDE, _FEW, _BF16),
    Rate("unpacked_8", partial(_packed, 8, True), _WIDE, _FEW, _BF16),
    Rate("attention", _attention, (24, 4296, 128), (4, 256, 128), _BF16),
    Rate("attention_edit", _attention, (6, 8400, 128), (2, 384, 128), _BF16),
    Rate("convolution_384", _convolution, (128, 384), (8, 384), _FP32),
    Rate("convolution_192", _convolution, (256, 192), (16, 192), _FP32),
    Rate("convolution_96", _convolution, (512, 96), (32, 96), _FP32),
    Rate("copy", _copy, _STREAM, _ROWS, _BF16, "gbs"),
    Rate("layer_norm", _norm, (8192, 3072), _ROWS, _BF16, "gbs"),
    Rate("gelu", partial(_passing, gelu_tanh), _STREAM, _ROWS, _BF16, "gbs"),
)
