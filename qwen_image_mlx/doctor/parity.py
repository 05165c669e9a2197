"""One block of each network at real width: the default device against the CPU stream, and against stored values.

The stored values were computed in fp32 on Linux by `scripts/doctor_values.py`: of every result 64 values and the norms
of its four quarters. On a machine without a GPU the comparison with them, and of two runs, is what is left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..models import nn
from .fingerprint import fingerprint
from .measure import falsified, numbers, on_gpu, relative_error, tolerance_of
from .outcome import Outcome
from .parts import PARTS, Case, Part

STORED = Path(__file__).parent / "stored" / "parity.json"
_VALUES, _QUARTERS = 64, 4
_HALF = 2e-2  # maximum relative error of a bf16 block against fp32
_WORSE = 1.3  # maximum ratio of the GPU's error in bf16 to the CPU's


def run(options: Mapping[str, Any]) -> Outcome:
    """Checks every part; one is in memory at a time."""
    outcome = Outcome()
    for part in PARTS:
        check(part, on_gpu(), outcome)
        mx.clear_cache()
    shares = [value for case in outcome.figures.values() for name, value in case.items() if name == "stored_error"]
    outcome.summary = (
        f"{len(shares)} blocks of real width are right: fp32 within {max(shares):.1e} of the stored values, the same "
        "bits twice" + (", on the GPU as on the CPU" if on_gpu() else "")
    )
    return outcome


def check(part: Part, large: bool, outcome: Outcome) -> None:
    """Runs a part in all its cases and dtypes; adds figures and findings.

    Args:
        part: a row of the table.
        large: whether to take the shapes for GPUs.
        outcome: receives figures and findings.
    """
    module, exact = part.build(), {}
    for dtype in (mx.float32, mx.bfloat16) if part.halves else (mx.float32,):
        module.set_dtype(dtype)
        for case in part.cases:
            got, cpu, same = compute(module, case, large, dtype)
            figures = outcome.figures.setdefault(case.name, {})
            if not same:
                outcome.find("wrong", f"{case.name} in {_dtype_name(dtype)} gives other bits when it is run again")
            if dtype == mx.float32:
                exact[case.name] = cpu
                figures |= _judge_exact(part, case, large, got, cpu, outcome)
            else:
                figures |= _judge_half(case, got, cpu, exact[case.name], outcome)


def compute(module: nn.Module, case: Case, large: bool, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray, bool]:
    """A case's result on the default device, the same on the CPU, and whether two runs gave equal bits; all fp32."""
    shape = case.large if large else case.small
    first = numbers(case.run(module, shape, dtype))
    same = first.tobytes() == numbers(case.run(module, shape, dtype)).tobytes()
    cpu = first
    if on_gpu():
        with mx.stream(mx.cpu):
            cpu = numbers(case.run(module, shape, dtype))
    return falsified(case.name, first), cpu, same


def _judge_exact(
    part: Part, case: Case, large: bool, got: np.ndarray, cpu: np.ndarray, outcome: Outcome
) -> dict[str, Any]:
    allowed = tolerance_of(mx.float32, part.tolerance)
    figures = {"stored_error": stored_error(case.name, large, got)}
    if on_gpu():
        figures["cpu_error"] = relative_error(got, cpu)
        if case.name == "vae-decoder":
            steps = np.abs(np.round(255 * got) - np.round(255 * cpu))
            figures |= {"levels_changed_ratio": float((steps > 0).mean()), "most_levels": int(steps.max())}
    for name, error in figures.items():
        if name.endswith("_error") and error > allowed:
            what = "the values stored" if name == "stored_error" else "the CPU"
            outcome.find(
                "wrong",
                f"{case.name} in fp32 is {error:.1e} off {what}, where {allowed:.0e} is allowed; run `doctor --only "
                "probe`, and install MLX's wheel from PyPI",
            )
    return figures


def _judge_half(case: Case, got: np.ndarray, cpu: np.ndarray, exact: np.ndarray, outcome: Outcome) -> dict[str, Any]:
    figures = {"bf16_error": relative_error(got, exact)}
    if on_gpu():
        figures["bf16_cpu_error"] = relative_error(cpu, exact)
    allowed = min(_HALF, _WORSE * figures.get("bf16_cpu_error", _HALF))
    if figures["bf16_error"] > allowed:
        outcome.find(
            "wrong",
            f"{case.name} in bf16 is {figures['bf16_error']:.1e} off fp32, where {allowed:.0e} is allowed; run "
            "`doctor --only probe`, and install MLX's wheel from PyPI",
        )
    return figures


def _dtype_name(dtype: mx.Dtype) -> str:
    return "fp32" if dtype == mx.float32 else "bf16"


def sample(result: np.ndarray) -> dict[str, list[float]]:
    """The stored fingerprint of a result: evenly spaced values, and the norms of its quarters."""
    values, norms = fingerprint(result, _VALUES, _QUARTERS)
    return {"values": values.tolist(), "norms": norms.tolist()}


def stored_error(name: str, large: bool, got: np.ndarray) -> float:
    """A result's distance from its stored fingerprint: the larger of the values' and the norms' relative errors."""
    right, found = stored_values()[key_of(name, large)], sample(got)
    return max(relative_error(np.array(found[kind]), np.array(right[kind])) for kind in ("values", "norms"))


def key_of(name: str, large: bool) -> str:
    """A case's name in the stored values."""
    return f"{name}/{'large' if large else 'small'}"


@cache
def stored_values() -> dict[str, Any]:
    """The stored fingerprints, by case."""
    return json.loads(STORED.read_text(encoding="utf-8"))
