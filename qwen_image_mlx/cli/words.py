"""Values that only the command line knows: `-` for a prompt on stdin, -1 for a random seed, {seed} in a file name."""

from __future__ import annotations

import re
import secrets
import sys
from typing import Any

from ..errors import RequestError
from ..pipeline.request import slug
from ..runtime.ranks import current

MAX_BYTES = 1_000_000  # of a prompt on stdin
RANDOM = -1
PLACEHOLDERS = ("seed", "index", "prompt")  # in the name of an output
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def read_prompt(given: dict[str, Any]) -> None:
    """Replaces a prompt `-` by the text on stdin; raises RequestError if that is not text."""
    if given.get("negative_prompt") == "-":
        raise RequestError("the negative prompt is '-', but only the prompt is read from stdin: write it out")
    if given.get("prompt") != "-":
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("the prompt is '-', which reads it from stdin, but stdin has none: pipe a text into it")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RequestError(f"stdin has more than {MAX_BYTES:,} bytes, which is too much for a prompt")
    try:
        given["prompt"] = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError("stdin is not text in UTF-8, so it is not a prompt") from error
    if not given["prompt"]:
        raise RequestError("stdin is empty, but must have the prompt")


def draw_seed() -> int:
    """A random seed, with as many bits as torch's generator uses; the same on all ranks."""
    return current().led(lambda: secrets.randbelow(2**32))


def fill_placeholders(output: str | None, **facts: Any) -> str | None:
    """The name of an output with its placeholders filled in.

    Args:
        output: a name, with any of {seed}, {index} and {prompt}.
        facts: the value of each; a missing one, or None, differs among the saved files and raises.

    Raises:
        RequestError: it has a placeholder that is unknown, or that has no single value here.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in PLACEHOLDERS:
            names = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise RequestError(f"--output has {match[0]:.40}, but only {names} are filled in; choose another name")
        if facts.get(match[1]) is None:
            raise RequestError(f"--output has {match[0]}, but the saved files have no single {match[1]}; leave it out")
        return slug(facts[match[1]]) if match[1] == "prompt" else str(facts[match[1]])

    return None if output is None else _PLACEHOLDER.sub(fill, output)
