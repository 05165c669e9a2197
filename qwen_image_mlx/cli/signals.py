"""Signals that end a command: Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP raise subclasses of it.

A server that can no longer work ends itself with GaveUp.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: the command ends as after Ctrl-C, and leaves no incomplete file."""


class HungUp(Terminated):
    """SIGHUP: the terminal was closed."""


class GaveUp(Exception):
    """A command ends itself, so that a supervisor starts it again: a sentence for people, and exit code 1."""


ENDS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}


@contextmanager
def handle_signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Replaces signal handlers inside the block, except for ignored signals, as under `nohup`.

    It does nothing in threads other than the main one, where Python cannot set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()
              if signal.getsignal(number) != signal.SIG_IGN}  # fmt: skip
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated upon SIGTERM, HungUp upon SIGHUP."""

    def end(number: int, frame: object) -> NoReturn:
        raise ENDS[number]

    with handle_signals({signal.SIGTERM: end, signal.SIGHUP: end}):
        yield
