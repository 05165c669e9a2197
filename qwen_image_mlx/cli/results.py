"""stdout, where results go: what cannot be written there ends a command as what cannot be written anywhere does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from ..errors import OutputError


class Unread(Exception):
    """Whoever read stdout has gone, as `head` does: nothing is wrong, and nothing more is to be done."""


class _Results:
    """A stream whose faults are `Unread` and OutputError."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._end(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._end(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _end(self, error: OSError) -> NoReturn:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # what still waits is written when Python ends, and would fail again
        os.close(null)
        if isinstance(error, BrokenPipeError):
            raise Unread from error
        raise OutputError(f"cannot write to stdout: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def results() -> Iterator[None]:
    """For a while, raises where stdout cannot be written, at the latest at the end.

    Raises:
        Unread: nobody reads it any more.
        OutputError: its disk is full, or it is broken otherwise.
    """
    stream = sys.stdout
    if stream is None:  # closed before we began; print says nothing then
        yield
        return
    sys.stdout = _Results(stream)  # type: ignore[assignment]
    try:
        try:
            yield
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    finally:
        sys.stdout = stream
