"""What only a command line says: `-` for a prompt on stdin, -1 for a seed nobody has chosen, {seed} in a name."""

from __future__ import annotations

import re
import secrets
import sys
from typing import Any

from ..errors import RequestError

MOST_BYTES = 1_000_000  # of a prompt on stdin
RANDOM = -1
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def read_prompt(given: dict[str, Any]) -> None:
    """Puts what stdin says in place of a prompt `-`; raises RequestError where that is not a text."""
    if given.get("negative_prompt") == "-":
        raise RequestError("the negative prompt is '-', but only a prompt is read from stdin: write its words")
    if given.get("prompt") != "-":
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("the prompt is '-', which reads it from stdin, but stdin has none: pipe a text into it")
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise RequestError(f"stdin has more than {MOST_BYTES:,} bytes, which is too much for a prompt")
    try:
        given["prompt"] = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError("stdin is not text in UTF-8, so it is not a prompt") from error
    if not given["prompt"]:
        raise RequestError("stdin is empty, so there is no prompt in it")


def draw_seed() -> int:
    """A random seed, with as many bits as torch's generator uses."""
    return secrets.randbelow(2**32)


def filled(output: str | None, seed: int | None) -> str | None:
    """The name of an output with its {seed} filled in.

    Raises:
        RequestError: it has a placeholder that means nothing here; `seed` is None where {seed} is one.
    """

    def fill(match: re.Match) -> str:
        if match[1] != "seed":
            raise RequestError(f"--output has {match[0]:.40}, but only {{seed}} is filled in; choose another name")
        if seed is None:
            raise RequestError("--output has {seed}, but there is not one seed for all that is saved; leave it out")
        return str(seed)

    return None if output is None else _PLACEHOLDER.sub(fill, output)
