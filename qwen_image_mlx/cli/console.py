"""What is shown while a command runs: progress bars and messages on stderr, without tearing each other; or, for an app
that runs it with --json, events on stdout, one a line."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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


class Console:
    """A command's progress callback, messages and results; a context manager that ends the last bar.

    Args:
        arguments: the flags, of which quiet, verbose and json count.

    With json, stdout gets an object a line, each with "event": "progress" (stage, detail, step, total), "message"
    (level, text) and "result" (path, and what belongs to it); `main` adds "error" (message).
    """

    def __init__(self, arguments: argparse.Namespace):
        self._json = bool(getattr(arguments, "json", None))
        self._quiet = bool(getattr(arguments, "quiet", None))
        self.verbose = bool(getattr(arguments, "verbose", None))
        self._bars = ProgressBars()
        self._stack = ExitStack()

    def __call__(self, progress: Progress) -> None:
        if self._json:
            if progress.stage != "layer" or self.verbose:
                said = {name: getattr(progress, name) for name in ("stage", "detail", "step", "total")}
                event("progress", **said)
        elif not self._quiet:
            self._bars(progress)

    def result(self, path: Path | str, *lines: str, **facts: Any) -> None:
        """Says what was made: its path and further lines, or an event with the facts."""
        self.close()
        if self._json:
            event("result", path=str(path), **facts)
        else:
            print(path, *lines, sep="\n", flush=True)

    def close(self) -> None:
        """Ends the current bar."""
        self._bars.close()

    def __enter__(self) -> Console:
        level = logging.WARNING if self._quiet else logging.DEBUG if self.verbose else logging.INFO
        self._stack.enter_context(messages(level, as_events=self._json))
        return self

    def __exit__(self, *fault: Any) -> None:
        self.close()
        self._stack.close()


def event(kind: str, **facts: Any) -> None:
    """Prints an event for an app that reads stdout."""
    print(json.dumps({"event": kind, **facts}, default=str), flush=True)


class _EventHandler(logging.Handler):
    """Prints the package's messages as events."""

    def emit(self, record: logging.LogRecord) -> None:
        event("message", level=record.levelname.lower(), text=record.getMessage()[:_MOST])


class _ConsoleHandler(logging.Handler):
    """Writes the package's messages above the bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + printable(record.getMessage(), _MOST), file=sys.stderr)


@contextmanager
def messages(level: int = logging.INFO, *, as_events: bool = False) -> Iterator[None]:
    """Sends the package's log messages from a level on to stderr, or as events to stdout, for a while."""
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level, logger.propagate
    handler = _EventHandler() if as_events else _ConsoleHandler()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
