"""TOML with the line of every key: the parser gives values alone, and a person wants to know where to look."""

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


def parse_toml(data: bytes, where: str) -> tuple[dict[str, Any], dict[Names, int]]:
    """What a file says, and the line (from 1) where each table and key first stands, by its names from the outermost.

    Args:
        data: the file's bytes, UTF-8 with or without a byte order mark.
        where: how errors call the file.

    Raises:
        RequestError: it is not TOML; the message has the line.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise RequestError(f"{where}, line {line}: this is not UTF-8") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        parts = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        begun = [line for line, _, _ in _statements(text)]  # one that does not end is the last
        line, reason = (parts[2] or begun[-1], parts[1]) if parts else (begun[-1], "this cannot be read as TOML")
        raise RequestError(f"{where}, line {line}: {reason[:1].lower()}{reason[1:]}") from None
    found: dict[Names, int] = {}
    table: Names = ()
    for line, statement, said in _statements(text):
        paths = list(_paths(said))
        if statement.lstrip().startswith("["):
            table, outer = paths[-1], ()
        else:
            outer = table
        for path in paths:
            found.setdefault(outer + path, line)
    return values, found


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(first line, text, what it says) of each header and each key with its value.

    A statement ends with a line, and its first lines alone are no TOML: so lines are joined until they are.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    first = 0
    for last in range(len(lines)):
        statement = "\n".join(lines[first : last + 1])
        try:
            said = tomllib.loads(statement)
        except (ValueError, RecursionError):
            continue
        if said:
            yield first + 1, statement, said
        first = last + 1
    if first < len(lines):
        yield first + 1, "\n".join(lines[first:]), {}


def _paths(said: dict[str, Any], outer: Names = ()) -> Iterator[Names]:
    """The names of every table and key, the outer ones first."""
    for name, value in said.items():
        yield (*outer, name)
        if isinstance(value, dict):
            yield from _paths(value, (*outer, name))
