"""Finds config.toml and reads a profile's settings, each value with its origin; errors name the line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..names import StrPath
from ..options import Group, Kind, Several
from ..pipeline.parameters import GENERATION
from ..registry import IN_CONTEXT
from ..variants import DEMO_CONTROL, DEMOS, full_name
from .lines import Names, parse_toml
from .schema import DEFAULT_PROFILE, SCHEMA, TABLE, table_name

VARIABLE = "QWEN_IMAGE_CONFIG"
NAME = "config.toml"
BUILT_IN = "built-in"
_MAX_BYTES = 100_000
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # pipes that a shell or a parent process writes to

_NAMES = (*DEMOS, DEMO_CONTROL, IN_CONTEXT)  # never files or folders
_ROWS = {(row.table, row.key): row for row in SCHEMA}
_HOMES = {row.key: row.table for row in SCHEMA} | {GENERATION: ""}


class UnknownProfile(RequestError):
    """A profile that the config does not have."""


@dataclass(frozen=True)
class Settings:
    """The settings of a profile.

    Attributes:
        path: the file; None without one.
        profile: the profile's name.
        values: by the key of every setting in `SCHEMA`; None where it is not set.
        origins: by the same keys, "FILE [TABLE]" or "built-in".
    """

    path: Path | None
    profile: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def __getitem__(self, key: str) -> Any:
        """The value of a setting; None if it is not set."""
        return self.values[key]

    def of_command(self, command: str, model: str | None = None) -> dict[str, Any]:
        """The settings of a command, by the names of the flags they stand for.

        Args:
            command: a key of `Setting.feeds`.
            model: the requested model; if it is not the config's or the default one, settings that apply to those
                alone are left out.
        """
        rows = {row.feeds[command]: row for row in SCHEMA if command in row.feeds}
        found = {flag: self.values[row.key] for flag, row in rows.items() if self.values[row.key] is not None}
        bound = {flag for flag in found if rows[flag].of_model}
        own = found.get("model", rows["model"].usual) if bound else None
        if model is not None and own is not None and full_name(model) != full_name(own):
            found = {flag: value for flag, value in found.items() if flag not in bound}
        return found


def default_place() -> Path:
    """The place of a user's own config.toml on this platform."""
    if sys.platform == "darwin":
        folder = "~/Library/Application Support"
    else:
        folder = os.environ.get("XDG_CONFIG_HOME", "")
        folder = folder if os.path.isabs(folder) else "~/.config"
    return Path(os.path.expanduser(folder), "qwen-image-mlx", NAME)


def find_config(explicit: StrPath | None = None) -> Path | None:
    """The file in force: the named one, QWEN_IMAGE_CONFIG's, the working directory's, the platform's; None without any.

    A config.toml in the working directory counts only if it is ours: if a profile in it has a table `qwen_image`.

    Raises:
        RequestError: the named one does not exist or cannot be read.
    """
    named = explicit if explicit is not None else os.environ.get(VARIABLE) or None
    if named is not None:
        if not os.fspath(named):
            raise RequestError("the config's name is empty: name a file")
        path = Path(os.path.expanduser(named))
        readable = os.path.exists(path) and not path.is_dir() and os.access(path, os.R_OK) and not _never_ends(path)
        if not readable:  # it is not opened: a pipe can be read only once
            why = "" if explicit is not None else f", which {VARIABLE} names,"
            raise RequestError(f"the config {path}{why} does not exist, or is not a file that can be read")
        return path
    if _is_ours(Path(NAME)):
        return Path(NAME)
    return default_place() if os.path.exists(default_place()) else None


def load_settings(path: Path | None, profile: str | None = None) -> Settings:
    """The settings of a profile, on top of those of `default`.

    The whole file is checked, except for other programs' tables. Relative paths of models and LoRAs that exist in the
    file's folder are taken from there.

    Args:
        path: the file; None is an empty one.
        profile: its name; None is `default`.

    Raises:
        RequestError: the file cannot be read or a setting in it is wrong; the message has the line.
        UnknownProfile: the profile does not exist.
    """
    profiles = {} if path is None else _profiles(path)
    chosen = DEFAULT_PROFILE if profile is None else profile
    if chosen not in {DEFAULT_PROFILE, *profiles}:
        there = f"{path} has {', '.join(dict.fromkeys([DEFAULT_PROFILE, *profiles]))}" if path else "no config exists"
        raise UnknownProfile(f"the profile {chosen!r} does not exist: {there}")
    values: dict[str, Any] = {row.key: None for row in SCHEMA}
    origins = dict.fromkeys(values, BUILT_IN)
    for name in (DEFAULT_PROFILE, chosen):
        for key, (value, table) in profiles.get(name, {}).items():
            values[key], origins[key] = value, f"{path} [{table}]"
    return Settings(path, chosen, values, origins)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the config {path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise RequestError(f"the config {path} has more than {_MAX_BYTES // 1000} KB, which is too much for settings")
    return data


def _never_ends(path: Path) -> bool:
    """Whether opening a file may wait for ever: a named pipe without a writer."""
    return path.is_fifo() and not str(path).startswith(_PIPES)


def _is_ours(path: Path) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        data = _read(path)
    except RequestError:  # the owner is unknown
        return False
    if TABLE.encode() not in data:
        return False
    try:
        found, _ = parse_toml(data, "")
    except RequestError:  # damaged; the owner has to know
        return re.search(rb"^\s*\[[^\]\n]*\b%b\b" % TABLE.encode(), data, re.MULTILINE) is not None
    return any(isinstance(profile, dict) and isinstance(profile.get(TABLE), dict) for profile in found.values())


def _profiles(path: Path) -> dict[str, dict[str, tuple[Any, str]]]:
    """By the name of a profile and a setting's key: its stored value, and the table it is in."""
    found, lines = parse_toml(_read(path), str(path))
    profiles: dict[str, dict[str, tuple[Any, str]]] = {}
    for name, tables in found.items():
        if isinstance(tables, dict) and TABLE in tables:
            profiles[name] = dict(_check(path, tables[TABLE], (name, TABLE), lines))
    if found and not profiles:
        raise RequestError(f"{path} has no table [{table_name(DEFAULT_PROFILE, '')}], so it sets nothing here")
    return profiles


def _check(path: Path, found: Any, outer: Names, lines: Mapping[Names, int]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(key, (value, table)) of every setting in a profile's table and in the one inside it."""

    def fault(names: Names, message: str) -> RequestError:
        return RequestError(f"{path}, line {lines[names]}: {message}")

    if not isinstance(found, dict):
        raise fault(outer, f"{outer[-1]} is {_quote(found)}, but must be a table")
    table = "".join(outer[2:])
    for key, value in found.items():
        names = (*outer, key)
        if not table and key == GENERATION:
            yield from _check(path, value, names, lines)
        elif row := _ROWS.get((table, key)):
            if wrong := row.kind.fault(key, value):
                raise fault(names, wrong.sentence(_quote(wrong.value)))
            try:
                value = row.kind.store(value)
            except RequestError as error:
                raise fault(names, str(error)) from None
            yield key, (_resolve(value, row.kind, path.parent) if row.place else value, table_name(outer[0], table))
        elif key in _HOMES:
            raise fault(names, f"{key} belongs in [{table_name(outer[0], _HOMES[key])}]")
        else:
            raise fault(names, f"{key:.80} is not a setting; {_nearest(key)}")


def _nearest(key: str) -> str:
    near = get_close_matches(key.lower().replace("-", "_"), _HOMES, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(_HOMES)}"


def _quote(value: Any) -> str:
    """A value roughly as TOML writes it, cut to 80 characters."""
    try:
        return f"{json.dumps(value, ensure_ascii=False, default=str):.80}"
    except RecursionError:
        return "a very deep table"


def _resolve(value: Any, kind: Kind, folder: Path) -> Any:
    """A value with ~ expanded in its paths; those that exist in the config's folder are taken from there.

    A text in a list is a LoRA: REF or REF@STRENGTH.
    """
    if isinstance(kind, Several):
        if isinstance(kind.kind, Group):
            return [_resolve(one, kind.kind, folder) for one in value]
        return [_resolve_lora(one, folder) for one in value]
    if isinstance(kind, Group):
        return {name: _place(one, folder) if kind.rows[name].place else one for name, one in value.items()}
    return _place(value, folder)


def _place(value: str, folder: Path) -> str:
    local = folder / os.path.expanduser(value)
    return str(local) if value not in _NAMES and os.path.exists(local) else os.path.expanduser(value)


def _resolve_lora(reference: str, folder: Path) -> str:
    """REF or REF@STRENGTH with the place of REF; an existing path that contains an @ is a path."""
    place, at, strength = reference.rpartition("@")
    if not at or os.path.exists(folder / os.path.expanduser(reference)):
        return _place(reference, folder)
    return f"{_place(place, folder)}@{strength}"
