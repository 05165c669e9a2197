"""Reports a running call's progress to its caller: the only upward call in the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Cancelled
from ..names import Stage
from .progress import Progress, ProgressCallback, Shown


class Reporter:
    """Hands progress to the current callback.

    Args:
        callback: the one used outside of `using`.
    """

    def __init__(self, callback: ProgressCallback | None = None):
        self._callback = callback

    @property
    def is_heard(self) -> bool:
        """Whether there is a callback."""
        return self._callback is not None

    @contextmanager
    def report_to(self, progress: Shown) -> Iterator[None]:
        """Inside the block, progress goes to `progress`."""
        if progress is None and not self.is_heard:
            from .bars import ProgressBars

            with ProgressBars() as bars, self.using(bars):
                yield
        else:
            with self.using(progress or None):
                yield

    @contextmanager
    def using(self, callback: ProgressCallback | None) -> Iterator[None]:
        """Replaces the callback inside the block; None keeps it."""
        previous = self._callback
        self._callback = callback or previous
        try:
            yield
        finally:
            self._callback = previous

    def __call__(self, progress: Progress) -> None:
        """Reports progress; raises Cancelled if the callback cancelled."""
        if self._callback is not None:
            self._callback(progress)
            if progress._cancelled:
                raise Cancelled(f"cancelled during {progress.stage}")

    def download(self, name: str, done: int, total: int) -> None:
        """Reports a download: file or component, bytes done, bytes in all."""
        self(Progress("download", done, total, name))

    @contextmanager
    def stage(self, name: Stage, detail: str = "") -> Iterator[None]:
        """Reports the beginning and, unless it fails, the end of a stage."""
        self(Progress(name, 0, 1, detail))
        yield
        self(Progress(name, 1, 1, detail))
