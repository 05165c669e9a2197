"""Every operation of the networks at real shapes: the default device against fp32 on the CPU; the effect of compiling.

`OPERATIONS` is the table; to add an operation, add a row. On the CPU the same rows run with smaller shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..weights import quantize
from .kinds import OPERATIONS, Operation
from .measure import falsified, on_gpu, relative_error
from .outcome import Outcome
from .values import array

_MATRIX, _GPU_MATRIX = (64, 768), (1024, 3072)  # whose quantizing is compared with compiling and without


def run(options: Mapping[str, Any]) -> Outcome:
    """Runs every row, one after the other; each leaves no memory behind."""
    outcome, errors = Outcome(), {}
    for operation in OPERATIONS:
        errors[operation.name] = error = error_of(operation, on_gpu())
        if error > operation.allowed:
            outcome.find(
                "wrong",
                f"this MLX build miscomputes {operation.name}: {error:.1e} off where {operation.allowed:.0e} is "
                "allowed (compare mlx#3797); install the wheel from PyPI: pip install --force-reinstall mlx",
            )
        mx.clear_cache()
    outcome.figures = {f"{name}_error": error for name, error in errors.items()}
    changed = outcome.figures["quantizer_changed_ratio"] = changed_by_compiling(_GPU_MATRIX if on_gpu() else _MATRIX)
    if changed:
        outcome.find(
            "odd",
            f"the quantizer as it runs here (compiled) differs from uncompiled in {changed:.1e} of its words: a "
            "model that is quantized here is not bit for bit the one of a different machine; report this",
        )
    farthest = max(OPERATIONS, key=lambda operation: errors[operation.name] / operation.allowed)
    share = errors[farthest.name] / farthest.allowed
    outcome.summary = (
        f"{len(OPERATIONS)} operations are correct; the one with the largest error, {farthest.name}, is at {share:.0%} "
        "of its tolerance"
    )
    return outcome


def error_of(operation: Operation, large: bool) -> float:
    """The maximum relative error among an operation's results.

    Args:
        operation: a row of the table.
        large: whether to take the shapes for GPUs.
    """
    shape, dtype = (operation.large, operation.dtype) if large else (operation.small, operation.cpu or operation.dtype)
    pairs = operation.kind(operation.name, shape, dtype)
    return max(relative_error(falsified(operation.name, got), expected) for got, expected in pairs)


def changed_by_compiling(shape: tuple[int, int]) -> float:
    """The share of a quantized matrix's words and scales whose bits compiling changes; on a CPU nothing is compiled.

    Args:
        shape: (rows, columns) of the matrix; it is quantized to 4 and to 8 bits.
    """
    return max(float(np.mean(_quantize(shape, bits) != _run_uncompiled(shape, bits))) for bits in (4, 8))


def _quantize(shape: tuple[int, int], bits: int) -> np.ndarray:
    """Words, scales and biases, as they are in memory, one after another; as float64, which holds them exactly."""
    packed = quantize.quantize_matrix(array("compiled", shape, mx.float32), quantize.Scheme("affine", bits, 64))
    parts = (packed.weight, *(part.view(mx.uint16) for part in (packed.scales, packed.biases)))
    return np.concatenate([np.array(part).astype(np.float64).reshape(-1) for part in parts])


def _run_uncompiled(shape: tuple[int, int], bits: int) -> np.ndarray:
    fused, quantize.fused = quantize.fused, lambda function: function
    try:
        return _quantize(shape, bits)
    finally:
        quantize.fused = fused
