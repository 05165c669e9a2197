"""MLX's runtime on a GPU: waiting for results, queueing work layer by layer, and recognising faults by their text."""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import wraps
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from .errors import GPUError
from .names import Fault

F = TypeVar("F", bound=Callable[..., Any])

_MAX_TEXT = 160  # characters of MLX's own text that a message keeps


class _Fault(NamedTuple):
    """A kind of error: the pattern its text begins with, and the GPUError for it."""

    pattern: str
    fault: Fault
    sentence: str
    fatal: bool = False


_COMMAND = r"\[METAL\] Command buffer execution failed: .*"
_CUDA = r"(cu[a-z]*[A-Z]\w*|nvrtc\w*).* failed"
_RELAX = "or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, which lets macOS wait longer"
_TOO_LITTLE = (
    "the GPU has too little memory for this: choose a smaller size, quantize the weights, or close other programs"
)
_TOO_LONG = (
    "macOS stopped the GPU's work because it took too long: choose a smaller size, keep the weights on the internal "
    f"disk, close other programs so that the Mac does not swap, {_RELAX}"
)
_AGAIN = "the GPU failed: try again, and if it fails once more start the program again"

# The first row that fits counts. Texts of MLX 0.32.4: backend/metal/{device,allocator,event,conv}.cpp as they stand in
# the macOS wheel's libmlx.dylib; backend/cuda/{utils,allocator}.cpp. The text after "execution failed" is macOS' own
# (IOGPUFamily), as quoted in mlx#479, #3267, ollama#17902, omlx#3706, mlx-vlm#1064. AGX_RELAX…: mlx#3267.
_FAULTS = (
    _Fault(
        _COMMAND + "(SubmissionsIgnored|Ignored \\()", "refused",
        "macOS refuses this process the GPU after earlier faults: start the program again", fatal=True,
    ),
    _Fault(_COMMAND + "(ErrorOutOfMemory|Insufficient Memory)", "memory", _TOO_LITTLE),
    _Fault(_COMMAND + "(ErrorTimeout|ErrorHang|GPU Timeout|GPU Hang)", "timeout", _TOO_LONG),
    _Fault(
        _COMMAND + "(ImpactingInteractivity|Impacting Interactivity)", "busy display",
        "macOS stopped the GPU's work because it held up the display: choose a smaller size, show less on the "
        f"screen or turn it off, {_RELAX}",
    ),
    _Fault(
        _COMMAND + "(InnocentVictim|victim of GPU error)", "unknown",
        "the GPU failed in another program and macOS stopped this work as well: try again",
    ),
    _Fault(
        _COMMAND + "(PageFault|Address Fault)", "unknown",
        "the GPU used a wrong address: start the program again, and report it if it comes back",
    ),
    _Fault(
        r"(\[metal::malloc\] Attempting to allocate|\[conv\] A single unfolding row needs)", "memory",
        "one array would be larger than this GPU allows: choose a smaller size",
    ),
    _Fault(r"\[metal::malloc\]|\[malloc\w*\] Unable to allocate", "memory", _TOO_LITTLE),
    _Fault(
        r"Failed to load the (default )?metallib|\[metal::Device\] Unable to (build|load)", "unknown",
        "MLX's kernels do not load here: install MLX again with pip, for this version of macOS",
    ),
    _Fault(r"\[METAL\]|\[(metal::\w+|Event::Event)\] (Failed|Unable) to", "unknown", _AGAIN),
    _Fault(_CUDA + ".*(out of memory|MemoryAllocation)", "memory", _TOO_LITTLE),
    _Fault(
        _CUDA + ".*(illegal|misaligned|unspecified launch failure|device-side assert|launch timed out)", "unknown",
        "the GPU used a wrong address or hung, and this process can no longer use CUDA: start the program again",
        fatal=True,
    ),
    _Fault(_CUDA, "unknown", _AGAIN),
)  # fmt: skip


def finish(*arrays: Any) -> None:
    """Evaluates arrays (or trees of them) and waits until the GPU is done with everything.

    `mx.eval` alone may return although a command buffer failed; its outputs are then zeros, which look like numbers.
    The error is raised when MLX synchronizes. Call this before a result is read, saved or returned.

    Raises:
        RuntimeError: the GPU failed; inside `gpu_faults` it is a GPUError.
    """
    mx.eval(*arrays)
    mx.synchronize()


def number(array: mx.array) -> float:
    """The value of an array of one real element; MLX's stubs type it as possibly complex."""
    return cast(float, array.item())


def all_finite(*arrays: mx.array) -> bool:
    """Whether arrays hold neither infinity nor NaN; waits for the GPU, so that its failure is not taken for an answer.

    Raises:
        RuntimeError: the GPU failed; inside `gpu_faults` it is a GPUError.
    """
    verdicts = [mx.isfinite(array).all() for array in arrays]
    finish(verdicts)
    return all(verdict.item() for verdict in verdicts)


def gpu_error(error: BaseException) -> GPUError | None:
    """The GPUError that stands for one of MLX's errors; None if it is not a fault of the GPU.

    MLX raises one class for everything that goes wrong while it computes or reads, RuntimeError, so the text decides.

    Args:
        error: what was raised; a GPUError is copied, without the traceback that keeps arrays in memory.
    """
    if isinstance(error, GPUError):
        return GPUError(str(error), fault=error.fault, fatal=error.fatal)
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return None
    row = next((row for row in _FAULTS if re.match(row.pattern, text)), None)
    if row is None:
        return None
    reason = re.sub("<[^>]*>", "<…>", text).rstrip(".")  # paths
    reason = reason if len(reason) <= _MAX_TEXT else reason[: _MAX_TEXT - 1] + "…"
    return GPUError(f"{row.sentence} ({reason})", fault=row.fault, fatal=row.fatal)


class _Faults(ContextDecorator):
    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and (fault := gpu_error(error)) is not None:
            raise fault from error

    def __call__(self, function: F) -> F:
        if not inspect.isgeneratorfunction(function):
            return super().__call__(function)

        @wraps(function)
        def converted(*arguments: Any, **named: Any) -> Any:
            with self:
                return (yield from function(*arguments, **named))

        return cast(F, converted)


def gpu_faults() -> _Faults:
    """Turns MLX's errors that are faults of the GPU into GPUError; all others pass.

    A context manager and a decorator; on a generator function it holds for the whole iteration.
    """
    return _Faults()


class Pace:
    """Evaluates a model layer by layer while the next layers are being built; models call it as their `on_layer`.

    The GPU never waits for Python, no more is queued than `unfinished` layers, and work can be cancelled in the time of
    a layer.

    Args:
        on_layer: called with the number of layers done or under way; an exception in it ends the work.
        unfinished: maximum number of queued layers; 1 where each holds weights that were read for it.
    """

    def __init__(self, on_layer: Callable[[int], None] = lambda count: None, unfinished: int = 2):
        self._on_layer = on_layer
        self._unfinished = unfinished
        self._queued: deque[mx.array] = deque()
        self._count = 0

    def begin(self) -> None:
        """Counts from the first layer again: a pass begins."""
        self._count = 0

    def __call__(self, arrays: Sequence[mx.array]) -> None:
        """Queues a layer's arrays, and waits until at most `unfinished` layers are queued."""
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        # All arrays of one call are done at the same time, so that one of them, the smallest, may stand for all.
        self._queued.append(min(arrays, key=lambda array: array.nbytes))
        if len(self._queued) > self._unfinished:
            mx.eval(self._queued.popleft())
        self._count += 1
        self._on_layer(self._count)
