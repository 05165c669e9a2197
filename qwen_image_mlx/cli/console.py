"""The output of a running command: progress bars and messages on stderr; with --json, events on stdout, one a line."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..outside import printable
from ..pipeline.bars import ProgressBars
from ..runtime.ranks import REPORT, leads

if TYPE_CHECKING:
    from ..pipeline.progress import Progress
    from ..runtime.profile import Profile

_MAX_CHARACTERS = 20_000  # of a message; tables are long


class Console:
    """A command's progress callback, messages and results; a context manager that ends the last bar.

    Args:
        arguments: the flags, of which quiet, verbose and json count.

    With json, stdout gets an object a line, each with "event": "progress" (stage, detail, step, total), "message"
    (level, text) and "result" (path, and what belongs to it); `main` adds "error" (message).
    """

    def __init__(self, arguments: argparse.Namespace):
        self._leads = leads()
        self._json = bool(getattr(arguments, "json", None)) and self._leads
        self._quiet = bool(getattr(arguments, "quiet", None)) or not self._leads
        self.verbose: bool = bool(getattr(arguments, "verbose", None))
        self._bars = ProgressBars()
        self._stack = ExitStack()

    def __call__(self, progress: Progress) -> None:
        if self._json:
            if progress.stage != "layer" or self.verbose:
                fields = {name: getattr(progress, name) for name in ("stage", "detail", "step", "total")}
                event("progress", **fields)
        elif not self._quiet:
            self._bars(progress)

    def timings(self, requested: bool) -> Profile | None:
        """A callback that measures every stage and then calls this one; None without --timings and --verbose."""
        if not requested and not self.verbose:
            return None
        from ..runtime.profile import Profile

        return Profile(self)

    def result(self, path: Path | str, *lines: str, **facts: Any) -> None:
        """Prints a result: its path and further lines, or an event with the facts."""
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
        level = level if self._leads else REPORT
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
        event("message", level=record.levelname.lower(), text=record.getMessage()[:_MAX_CHARACTERS])


class _ConsoleHandler(logging.Handler):
    """Writes the package's messages above the bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + printable(record.getMessage(), _MAX_CHARACTERS), file=sys.stderr)


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
