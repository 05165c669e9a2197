"""MLX's runtime on a GPU: results that are really there, and faults that are told by their text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .errors import GPUError


def finish(*arrays: Any) -> None:
    """Evaluates arrays (or trees of them) and waits until the GPU is done with everything.

    `mx.eval` alone may return although a command buffer failed; its outputs are then zeros, which look like numbers.
    The error is raised when MLX synchronizes. Call this before a result is read, saved or returned.

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


class Pace:
    """Evaluates a model layer by layer while the next layers are being built; models call it as their `on_layer`.

    The GPU never waits for Python, no more is queued than `unfinished` layers, and work can be cancelled in the time of
    a layer.

    Args:
        on_layer: told how many layers are done or under way; what it raises ends the work.
        unfinished: how many layers may be queued; 1 where each holds weights that were read for it.
    """

    def __init__(self, on_layer: Callable[[int], None] = lambda count: None, unfinished: int = 2):
        self._on_layer = on_layer
        self._unfinished = unfinished
        self._queued: deque[mx.array] = deque()
        self._count = 0

    def __call__(self, arrays: Sequence[mx.array]) -> None:
        """Queues a layer's arrays, and waits for the layers before to be few enough."""
        mx.async_eval(arrays)
        # All arrays of one call are done at the same time, so that one of them, the smallest, may stand for all.
        self._queued.append(min(arrays, key=lambda array: array.nbytes))
        if len(self._queued) > self._unfinished:
            mx.eval(self._queued.popleft())
        self._count += 1
        self._on_layer(self._count)
