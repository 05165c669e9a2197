"""Every operation of the networks at real shapes: the default device against fp32 on the CPU.

`OPERATIONS` is the table; to add an operation, add a row. On the CPU the same rows run with smaller shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .kinds import OPERATIONS, Operation
from .measure import falsified, on_gpu, relative_error
from .outcome import Outcome


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
    farthest = max(OPERATIONS, key=lambda operation: errors[operation.name] / operation.allowed)
    share = errors[farthest.name] / farthest.allowed
    outcome.summary = (
        f"{len(OPERATIONS)} operations are right; the least exact, {farthest.name}, is at {share:.0%} of its tolerance"
    )
    return outcome


def error_of(operation: Operation, large: bool) -> float:
    """The largest relative error among an operation's results.

    Args:
        operation: a row of the table.
        large: whether to take the shapes for GPUs.
    """
    shape, dtype = (operation.large, operation.dtype) if large else (operation.small, operation.cpu or operation.dtype)
    pairs = operation.kind(operation.name, shape, dtype)
    return max(relative_error(falsified(operation.name, got), expected) for got, expected in pairs)
