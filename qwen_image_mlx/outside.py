"""Handles untrusted input: makes text printable; checks files for kind and size before they are read."""

from __future__ import annotations

import math
import stat
import unicodedata
from pathlib import Path

from .names import StrPath

MOST = 2_000  # characters of a message
MAX_CHARACTERS = 1_000_000  # of a prompt and the text around it; models read some thousands
_PLAIN = " \n"
# Characters that move the cursor, change colours, reverse the writing or are not text: controls, formats, surrogates,
# private use, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def printable(text: object, most: int = MOST) -> str:
    """Text for people: characters that control a terminal are escaped, and the middle of a long text is left out.

    Args:
        text: anything; its `str`.
        most: maximum characters of it.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"
    text = text.replace("\t", "    ")
    return "".join(escape(c) if c not in _PLAIN and unicodedata.category(c) in _UNPRINTABLE else c for c in text)


def one_line(text: object, most: int = MOST) -> str:
    """Printable text on one line: every stretch of white space becomes one space."""
    return printable(" ".join(str(text).split()), most)


def escape(text: str) -> str:
    """Escape sequences for characters that are not printable."""
    return text.encode("unicode_escape").decode()


def why_not_read(path: StrPath, most: float = math.inf) -> str | None:
    """Why an existing file is not to be read: it is not a regular file, or has more than `most` bytes; None if it is.

    Nothing is opened: a pipe would wait for a writer. Raises OSError if it cannot be inspected.
    """
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_size > most:
        return f"it has {found.st_size / 1e6:,.0f} MB, more than the maximum of {most / 1e6:,.0f} MB"
    return None
