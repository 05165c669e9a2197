"""What only a command line says: `-` for a prompt on stdin, -1 for a seed nobody has chosen, {seed} in a name."""

from __future__ import annotations

import re
import secrets
import sys
from typing import Any

from ..errors import RequestError
from ..pipeline.request import slug

MOST_BYTES = 1_000_000  # of a prompt on stdin
RANDOM = -1
PLACEHOLDERS = ("seed", "index", "prompt")  # in the name of an output
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


def filled(output: str | None, **facts: Any) -> str | None:
    """The name of an output with what stands in braces filled in.

    Args:
        output: a name, with any of {seed}, {index} and {prompt}.
        facts: what they are; without one, or with None, there is not one for all that is saved.

    Raises:
        RequestError: it has a placeholder that means nothing, or nothing here.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in PLACEHOLDERS:
            names = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise RequestError(f"--output has {match[0]:.40}, but only {names} are filled in; choose another name")
        if facts.get(match[1]) is None:
            raise RequestError(
                f"--output has {match[0]}, but there is not one {match[1]} for all that is saved; leave it out"
            )
        return slug(facts[match[1]]) if match[1] == "prompt" else str(facts[match[1]])

    return None if output is None else _PLACEHOLDER.sub(fill, output)
