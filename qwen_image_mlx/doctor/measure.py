"""Measurements for the groups: finished results, seconds, relative errors, memory against the plan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu import finish
from ..models.qwen_image.config import TransformerConfig
from ..pipeline.pipeline import QwenImagePipeline
from ..runtime.memory_plan import MemoryPlan, Work, make_plan
from ..weights.synthetic import FULL, write_configs
from .chip import coarse_fp32
from .outcome import FALSIFY, Outcome, amount

GARBAGE = 1e9  # a relative error that stands for infinity, which JSON lacks
TOLERANCES = {mx.bfloat16: 4e-3, mx.float16: 2e-3, mx.float32: 1e-5}  # of one operation
_TOO_LOW = 1.2  # maximum ratio of measured to planned bytes
_highest = 0  # bytes: MLX's peak before it was last reset


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU by default; on the CPU all groups use smaller shapes."""
    return mx.default_device() == mx.gpu


def on_metal() -> bool:
    """Whether the GPU is Apple's; speed is judged there only."""
    return on_gpu() and mx.metal.is_available()


def seconds_of(fn: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the shortest of some runs, after one to warm up."""
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
    """|got - expected| / |expected|, Euclidean; at most `GARBAGE`, which also stands for NaN."""
    difference = got.astype(np.float64) - expected
    error = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30))
    return min(error, GARBAGE) if np.isfinite(error) else GARBAGE


def tolerance_of(dtype: mx.Dtype, own: float | None = None) -> float:
    """The maximum relative error of results in a dtype: the default one, or a check's own.

    On M5 with TF32 on, fp32 products keep 10 bits, and Winograd makes more of it: 6e-3 for convolutions.
    """
    tolerance = TOLERANCES[dtype] if own is None else own
    return max(tolerance, 8e-3) if dtype == mx.float32 and coarse_fp32() else tolerance


def falsified(name: str, got: np.ndarray) -> np.ndarray:
    """The result, or 1 % off where the self-test names that check."""
    return got * np.float32(1.01) if os.environ.get(FALSIFY) == name else got


def plan_bytes(
    folder: Path, stage: str, work: Work, transformer: TransformerConfig = FULL["transformer"], **others: Any
) -> int:
    """Bytes of a stage by the plan, in addition to resident weights.

    Args:
        folder: for configs.
        stage: "denoise" or "decode".
        work: the image to plan for.
        transformer, others: configs instead of the released ones.
    """
    write_configs(folder, {**FULL, "transformer": transformer, **others})
    strip = work.width * work.height
    plan: MemoryPlan = make_plan(QwenImagePipeline.from_pretrained(folder).components, work, strip_pixels=strip)
    (found,) = (each for each in plan.stages if each.name == stage)
    return found.peak - found.resident


def peak_of(fn: Callable[[], Any]) -> int:
    """Peak bytes of a call, in addition to those allocated before it."""
    global _highest
    mx.clear_cache()
    before, _highest = mx.get_active_memory(), highest_peak()
    mx.reset_peak_memory()
    fn()
    return mx.get_peak_memory() - before


def highest_peak() -> int:
    """The peak bytes of MLX's arrays in this process, including what `peak_of` has reset."""
    return max(_highest, mx.get_peak_memory())


def judge_memory(outcome: Outcome, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Finds plans that are too low: figures with `peak_bytes`, `plan_bytes` and `plan_ratio`, by name."""
    for name, figures in measured.items():
        if figures["plan_ratio"] > _TOO_LOW:
            outcome.find(
                "odd",
                f"{name} takes {amount(figures['peak_bytes'])}, but the memory plan predicts "
                f"{amount(figures['plan_bytes'])}; give --memory less than you have, and report this",
            )
