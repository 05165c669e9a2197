"""The table of settings, made from the options that have one, and the example made from it. Pure data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..options import Kind
from ..pipeline.parameters import GENERATION
from ..runtime.options import OPTIONS

TABLE = "qwen_image"  # of a profile
DEFAULT_PROFILE = "default"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row.

    Attributes:
        key: its name in the file.
        kind: the values it takes.
        help: its effect, in a sentence.
        usual: the default, in words.
        example: a value for the commented example.
        feeds: by the name of a command, the name of the flag it stands for; "edit" is `compose --harmonize` too.
        table: its table within `[PROFILE.qwen_image]`; "" for that one itself.
        place: whether it names files, which may be in the config's folder.
    """

    key: str
    kind: Kind
    help: str
    usual: str
    example: Any
    feeds: Mapping[str, str]
    table: str = ""
    place: bool = False


# The settings of a profile's own table come first.
SCHEMA = tuple(sorted((
    Setting(
        key=entry.key or row.name, kind=entry.kind or row.kind, help=entry.help or row.help,
        usual=entry.usual or row.usual, example=entry.example,
        feeds=dict.fromkeys(entry.commands or row.commands, row.name), table=entry.table, place=row.place,
    )
    for row in OPTIONS.values() for entry in row.config
), key=lambda row: row.table))  # fmt: skip


def table_name(profile: str, table: str) -> str:
    """A table's header without its brackets: `default.qwen_image.generation`."""
    return ".".join([profile, TABLE, *([table] if table else [])])


def example_config() -> str:
    """A config.toml that names every setting and sets none."""
    lines = ["# Settings of qwen-image-mlx. Take the # from a line to set it; flags of the command line win.", ""]
    for table in dict.fromkeys(row.table for row in SCHEMA):
        lines += [f"[{table_name(DEFAULT_PROFILE, table)}]"]
        for row in SCHEMA:
            if row.table == table:
                lines += [f"# {row.help} (where it is not set: {row.usual})"]
                lines += [f"#{row.key} = {json.dumps(row.example, ensure_ascii=False)}"]
        lines += [""]
    lines += ["# A second profile, chosen by --profile fast; settings it lacks are taken from default."]
    lines += [f"#[{table_name('fast', '')}]", "#quantize = 4", f"#[{table_name('fast', GENERATION)}]", "#steps = 20"]
    return "\n".join(lines) + "\n"
