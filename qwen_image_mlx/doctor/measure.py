"""What the groups measure with: finished results, seconds, relative errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu import finish
from .chip import coarse_fp32
from .outcome import FALSIFY

GARBAGE = 1e9  # a relative error that stands for infinity, which JSON lacks
TOLERANCES = {mx.bfloat16: 4e-3, mx.float16: 2e-3, mx.float32: 1e-5}  # of one operation


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU by default; on the CPU all groups use smaller shapes."""
    return mx.default_device() == mx.gpu


def on_metal() -> bool:
    """Whether that GPU is Apple's; speed is judged there only."""
    return on_gpu() and mx.metal.is_available()


def seconds_of(fn: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs, after one that does not count."""
    finish(fn())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        finish(fn())
        best = min(best, time.perf_counter() - start)
    return best


def numbers(x: mx.array) -> np.ndarray:
    """An array's finished values in fp32."""
    x = x.astype(mx.float32)
    finish(x)
    return np.array(x)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected|, Euclidean; at most `GARBAGE`, which also stands for what is not a number."""
    difference = got.astype(np.float64) - expected
    error = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30))
    return min(error, GARBAGE) if np.isfinite(error) else GARBAGE


def tolerance_of(dtype: mx.Dtype, own: float | None = None) -> float:
    """The largest relative error that is right for results in a dtype: the usual one, or a check's own.

    On M5 with TF32 on, fp32 products keep 10 bits, and Winograd makes more of it: 6e-3 for convolutions.
    """
    tolerance = TOLERANCES[dtype] if own is None else own
    return max(tolerance, 8e-3) if dtype == mx.float32 and coarse_fp32() else tolerance


def falsified(name: str, got: np.ndarray) -> np.ndarray:
    """A result as it is, or 1 % off where the self-test asks for that check by name."""
    return got * np.float32(1.01) if os.environ.get(FALSIFY) == name else got
