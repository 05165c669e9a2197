"""What people see on stderr while a command runs: progress bars and messages, without tearing each other."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..outside import one_line, printable

if TYPE_CHECKING:
    from ..pipeline.progress import Progress

_LABELS = {"denoise": "steps"}
_MOST = 20_000  # characters of a message; tables are long
_MOST_DETAIL = 200
_PAUSE = 1.0  # seconds between two looks at the layers of a step


class ProgressBars:
    """A progress callback that shows one bar per stage; a context manager that closes the last."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._bar: tqdm | None = None
        self._shown = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "layer":
            self._show_layer(progress)
            return
        key = progress.stage, progress.detail
        if key != self._key or self._bar is None or progress.step < self._bar.n:
            self.close()
            in_bytes = progress.stage in ("download", "quantize")
            self._key = key
            self._bar = tqdm(
                total=progress.total,
                desc=one_line(f"{_LABELS.get(progress.stage, progress.stage)} {progress.detail}", _MOST_DETAIL),
                unit="B" if in_bytes else "it",
                unit_scale=in_bytes,
                unit_divisor=1000,
                file=sys.stderr,
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str("", refresh=False)
        self._bar.total = progress.total
        self._bar.update(progress.step - self._bar.n)

    def _show_layer(self, progress: Progress) -> None:
        """Says behind the bar where a long step is."""
        now = time.monotonic()
        if self._bar is not None and now - self._shown >= _PAUSE:
            self._shown = now
            self._bar.set_postfix_str(f"layer {progress.step} of {progress.total}")

    def close(self) -> None:
        """Ends the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


class _ConsoleHandler(logging.Handler):
    """Writes the package's messages above the bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + printable(record.getMessage(), _MOST), file=sys.stderr)


@contextmanager
def messages() -> Iterator[None]:
    """Sends the package's log messages to stderr for a while."""
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level, logger.propagate
    handler = _ConsoleHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
