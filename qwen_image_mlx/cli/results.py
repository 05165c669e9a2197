"""stdout, where results go, and stderr, where messages go.

What cannot be written to stdout ends a command as what cannot be written anywhere does; a message that cannot be
written is dropped, because nobody can be told. A character that the encoding of a stream lacks is written as an escape.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from ..errors import OutputError
from ..outside import escaped, one_line, printable

_ESCAPED = "qwen_image_mlx.escaped"
_MOST = 20_000  # characters of a table's cell


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for characters that an encoding does not have: an escape, or the byte of a file's name itself."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return escaped(error.object[error.start : error.end]), error.end


codecs.register_error(_ESCAPED, _escaped)


class Unread(Exception):
    """Whoever read stdout has gone, as `head` does: nothing is wrong, and nothing more is to be done."""


class _Guarded:
    """A stream whose faults go to `_failed`."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: OSError) -> None:
        """Nothing is written any more: what still waits is written when Python ends, and would fail again."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


class _Results(_Guarded):
    """A stream whose faults are `Unread` and OutputError."""

    def _failed(self, error: OSError) -> NoReturn:
        super()._failed(error)
        if isinstance(error, BrokenPipeError):
            raise Unread from error
        raise OutputError(f"cannot write to stdout: {(error.strerror or str(error)).lower()}") from error


class _Messages(_Guarded):
    """A stream that may fail: a full disk or a closed terminal must not undo what is finished."""


@contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """Escapes for a while what the stream's encoding does not have."""
    errors = getattr(stream, "errors", None)
    if not hasattr(stream, "reconfigure") or errors is None:
        yield
        return
    stream.reconfigure(errors=_ESCAPED)
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


@contextmanager
def messages_kept() -> Iterator[None]:
    """For a while, no message on stderr can end a command."""
    stream = sys.stderr
    closed = open(os.devnull, "w", encoding="utf-8") if stream is None else None  # noqa: SIM115
    sys.stderr = _Messages(closed or stream)  # type: ignore[assignment]  # as much of one as is used
    try:
        with _escaping(closed or stream):
            try:
                yield
            finally:
                sys.stderr.flush()
    finally:
        sys.stderr = stream
        if closed:
            closed.close()


def print_table(rows: Sequence[Sequence[object]], most: int = _MOST) -> None:
    """Prints rows of cells, each column as wide as its widest cell; the last may have several lines."""
    if not rows:
        return
    lines = [[*(one_line(cell, most) for cell in row[:-1]), printable(row[-1], most)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    for line in lines:
        print(*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)), line[-1], sep="  ")


def json_text(facts: Any) -> str:
    """JSON for stdout: as it is where its encoding has all characters, else with JSON's own escapes."""
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(facts, indent=2)
    return text


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
    sys.stdout = _Results(stream)  # type: ignore[assignment]  # as much of one as is used
    try:
        with _escaping(stream):
            try:
                yield
            finally:  # --help leaves by SystemExit
                sys.stdout.flush()
    finally:
        sys.stdout = stream
