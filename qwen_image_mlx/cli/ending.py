"""How commands are ended from outside: Ctrl-C raises KeyboardInterrupt, and SIGTERM an exception of the same kind.

A server that cannot work any more ends itself: GaveUp.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: the command ends as by Ctrl-C, and nothing half-written stays."""


class GaveUp(Exception):
    """A command ends itself, so that a supervisor starts it again: a sentence for people, and exit code 1."""


ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextmanager
def handled(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Other handlers of signals for a while; nothing happens in threads, where signals cannot be asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated upon SIGTERM."""

    def end(number: int, frame: object) -> NoReturn:
        raise Terminated

    with handled({signal.SIGTERM: end}):
        yield
