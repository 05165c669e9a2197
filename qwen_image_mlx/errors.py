"""Everything this package raises on purpose.

Each message is one sentence a person can act on: the offending value, the allowed ones, the cure. The command line
turns any of them into exit code 2; a bug raises something else and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

from .names import Fault

_NAMES_SHOWN = 5


class QwenImageError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: the sentence.
        cause: the fault in a word or two, for callers that add a cure in their own terms.
    """

    def __init__(self, message: str = "", *, cause: str = ""):
        super().__init__(message)
        self.cause = cause


class RequestError(QwenImageError, ValueError):
    """A parameter is out of range, of the wrong type, or does not fit the model."""


class CheckpointError(QwenImageError):
    """A checkpoint's files are missing, damaged, or of a kind this package does not run."""


class GPUError(QwenImageError):
    """The GPU could not do the work: too little memory, too long, or macOS refuses the process.

    Args:
        message: the sentence.
        fault: what happened: "memory", "timeout", "busy display", "refused" or "unknown".
        fatal: whether this process can no longer use the GPU, and must be started again.
    """

    def __init__(self, message: str = "", *, fault: Fault = "unknown", fatal: bool = False):
        super().__init__(message, cause=f"fault: {fault}")
        self.fault = fault
        self.fatal = fatal


class RankError(QwenImageError):
    """One of the processes that `mlx.launch` started has ended, cannot be reached, or does not fit the others."""


class HubError(QwenImageError):
    """The Hugging Face Hub could not provide a model or file."""


class OutputError(QwenImageError, OSError):
    """A result could not be written."""


class Cancelled(QwenImageError):
    """The progress callback asked to stop; the pipeline stays usable."""


def some(names: Iterable[object], count: int = _NAMES_SHOWN) -> str:
    """The first few of many names and the number of the others, for a sentence."""
    listed = [str(name) for name in names]
    more = len(listed) - count
    return ", ".join(listed[:count]) + (f" and {more} more" if more > 0 else "")
