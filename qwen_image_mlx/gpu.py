"""MLX's runtime on a GPU: results that are really there, and faults that are told by their text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .errors import GPUError


def finish(*arrays: Any) -> None:
    """Evaluates arrays (or trees of them) and waits until the GPU is done with everything.

    `mx.eval` alone may return although a command buffer failed; its outputs are then zeros, which look like numbers. The
    error is raised when MLX synchronizes. Call this before a result is read, saved or returned.

    Raises:
        RuntimeError: the GPU failed; inside `gpu_faults` it is a GPUError.
    """
    mx.eval(*arrays)
    mx.synchronize()


def gpu_error(error: BaseException) -> GPUError | None:
    """The GPUError that stands for one of MLX's errors; None if it is not a fault of the GPU."""
    return GPUError(str(error)) if str(error).startswith("[METAL]") else None


@contextmanager
def gpu_faults() -> Iterator[None]:
    """Turns MLX's errors that are faults of the GPU into GPUError; all others pass."""
    try:
        yield
    except RuntimeError as error:
        if (fault := gpu_error(error)) is None:
            raise
        raise fault from error
