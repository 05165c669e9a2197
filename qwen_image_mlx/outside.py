"""What comes from outside: text made printable; files that are read only if they are files, and not too long."""

from __future__ import annotations

import math
import stat
import unicodedata
from pathlib import Path

from .names import StrPath

MOST = 2_000  # characters of a message
MAX_CHARACTERS = 1_000_000  # of a prompt and what stands around it; models read some thousands
_PLAIN = " \n"
# Characters that move the cursor, change colours, reverse the writing or are no text: controls, formats, surrogates,
# private use, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def printable(text: object, most: int = MOST) -> str:
    """Text for people: what a terminal would obey is escaped, and the middle of what is too long is left out.

    Args:
        text: anything; its `str`.
        most: characters that are shown of it.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"
    text = text.replace("\t", "    ")
    return "".join(escaped(c) if c not in _PLAIN and unicodedata.category(c) in _UNPRINTABLE else c for c in text)


def one_line(text: object, most: int = MOST) -> str:
    """The same on one line: every stretch of white space is one space."""
    return printable(" ".join(str(text).split()), most)


def escaped(text: str) -> str:
    """What stands for characters that cannot be shown."""
    return text.encode("unicode_escape").decode()


def why_not_read(path: StrPath, most: float = math.inf) -> str | None:
    """Why an existing file is not to be read: it is none, or has more than `most` bytes; None if it can be.

    Nothing is opened: a pipe would wait for whoever writes. Raises OSError if it cannot be looked at.
    """
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_size > most:
        return f"it has {found.st_size / 1e6:,.0f} MB, more than the {most / 1e6:,.0f} MB that are read"
    return None
