"""stdout, where results go, and stderr, where messages go.

If stdout cannot be written, the command ends with an error, as for any other output. If stderr cannot be written, the
message is dropped. A character that the encoding of a stream lacks is written as an escape.
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
from ..outside import escape, one_line, printable

_ESCAPED = "qwen_image_mlx.escaped"
_MAX_CHARACTERS = 20_000  # of a table's cell


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The replacement for characters that an encoding lacks: an escape, or the original byte of a file's name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return escape(error.object[error.start : error.end]), error.end


codecs.register_error(_ESCAPED, _escape)


class Unread(Exception):
    """The reader of stdout has closed it, as `head` does. This is not a fault; the command just ends."""


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
        """Stops writing, because buffered text would be written when Python ends and fail again."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


class _Results(_Guarded):
    """A stream whose faults are raised as `Unread` or OutputError."""

    def _failed(self, error: OSError) -> NoReturn:
        super()._failed(error)
        if isinstance(error, BrokenPipeError):
            raise Unread from error
        raise OutputError(f"cannot write to stdout: {(error.strerror or str(error)).lower()}") from error


class _Messages(_Guarded):
    """A stream whose faults are ignored: a full disk or a closed terminal must not undo finished work."""


@contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """Inside the block, characters that the stream's encoding lacks are escaped."""
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
    """Inside the block, a fault of stderr does not end the command."""
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


def print_table(rows: Sequence[Sequence[object]], max_characters: int = _MAX_CHARACTERS) -> None:
    """Prints rows of cells, each column as wide as its widest cell; the last may have several lines."""
    if not rows:
        return
    lines = [
        [*(one_line(cell, max_characters) for cell in row[:-1]), printable(row[-1], max_characters)] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    indent = "\n" + " " * (sum(widths) + 2 * len(widths))  # so that no line of a cell looks like a row
    for line in lines:
        cells = [f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)]
        print(*cells, line[-1].replace("\n", indent), sep="  ")


def json_text(facts: Any) -> str:
    """JSON for stdout, with JSON's own escapes if its encoding lacks a character."""
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(facts, indent=2)
    return text


@contextmanager
def results() -> Iterator[None]:
    """Inside the block, a fault of stdout is raised, at the latest at the end.

    Raises:
        Unread: nobody reads it any more.
        OutputError: its disk is full, or it is broken otherwise.
    """
    stream = sys.stdout
    if stream is None:  # closed before the program began; print ignores it then
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
