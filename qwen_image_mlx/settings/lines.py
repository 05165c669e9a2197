"""TOML with the line of every key, for error messages: the parser itself gives only values."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..errors import RequestError

Names = tuple[str, ...]
DEPTH = 4  # names of the innermost key that a setting has: PROFILE.qwen_image.generation.KEY

# Tokens that may hide the end of a line, or are it; an unterminated string takes the rest.
_TOKEN = re.compile(
    r'''"""(?:\\[\s\S]|[^\\])*?(?:"""(?:"{0,2})|\Z)'''
    r"""|'''[\s\S]*?(?:''''{0,2}|\Z)"""
    r"""|"(?:\\.|[^"\\\n])*"?|'[^'\n]*'?|\#[^\n]*|[\[\]{}\n]"""
)
_MAX_NAMES = 32  # of a key: the parser's time grows with their square
_BETWEEN = re.compile(r"[^\w. \t-]")


def parse_toml(data: bytes, where: str) -> tuple[dict[str, Any], dict[Names, int]]:
    """The values of a file, and the line (from 1) of each table and key, by its names from the outermost.

    Keys deeper than `DEPTH` names have no line.

    Args:
        data: the file's bytes, UTF-8 with or without a byte order mark.
        where: the file's name in errors.

    Raises:
        RequestError: it is not TOML; the message has the line.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise RequestError(f"{where}, line {line}: this is not UTF-8") from None
    for number, line in enumerate(_TOKEN.sub(_bare, text).split("\n"), 1):
        if any(part.count(".") >= _MAX_NAMES for part in _BETWEEN.split(line)):
            raise RequestError(f"{where}, line {number}: a key has more than {_MAX_NAMES} names, as no setting has")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        parts = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        line = (parts and parts[2]) or _fault(text)
        reason = parts[1] if parts else "this cannot be read as TOML"
        raise RequestError(f"{where}, line {line}: {reason[:1].lower()}{reason[1:]}") from None
    found: dict[Names, int] = {}
    table: Names = ()
    for line, statement in _statements(text):
        paths = list(_paths(tomllib.loads(statement)))
        if statement.lstrip().startswith("["):
            table, outer = paths[-1], ()
        else:
            outer = table
        for path in paths:
            if len(outer + path) <= DEPTH:
                found.setdefault(outer + path, line)
    return values, found


def _bare(token: re.Match[str]) -> str:
    """Replaces a string with a name and a comment with nothing, keeping line ends; all else stays."""
    return token[0] if token[0][0] in "[]{}\n" else ("_" if token[0][0] != "#" else "") + "\n" * token[0].count("\n")


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each header and each key with its value; an unterminated one is the last.

    A statement ends with a line, but not within a string or brackets.
    """
    text = text.replace("\r\n", "\n") + "\n"
    line = first = 1
    begin = depth = 0
    for token in _TOKEN.finditer(text):
        mark = token[0]
        line += mark.count("\n")
        depth = max(0, depth + (mark in "[{") - (mark in "]}"))
        if mark == "\n" and not depth:
            statement = text[begin : token.start()]
            if statement.strip() and not statement.lstrip().startswith("#"):
                yield first, statement
            begin, first = token.end(), line
    if text[begin:].strip():
        yield first, text[begin:]


def _fault(text: str) -> int:
    """The line of the first statement that is not TOML by itself, else of the last one, which contradicts others."""
    begun = 1
    for begun, statement in _statements(text):  # noqa: B007
        try:
            tomllib.loads(statement)
        except (ValueError, RecursionError):
            break
    return begun


def _paths(values: dict[str, Any], outer: Names = ()) -> Iterator[Names]:
    """The names of every table and key down to `DEPTH`, the outer ones first."""
    for name, value in values.items():
        yield (*outer, name)
        if isinstance(value, dict) and len(outer) + 1 < DEPTH:
            yield from _paths(value, (*outer, name))
