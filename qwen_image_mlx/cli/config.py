"""qwen-image-mlx config: shows, writes and finds config.toml; gives its settings to the other commands."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import OutputError, RequestError
from ..runtime.presets import GOVERNED
from ..settings import SCHEMA, default_place, example_config, find_config, load_settings
from .flags import add_option, rows
from .results import json_text, print_table

DESCRIPTION = """\
Show the settings of config.toml, write one, or print the path of the one in force: the file named by --config or by
QWEN_IMAGE_CONFIG; or config.toml in the working directory, if it has a table like [default.qwen_image]; or the one in
the platform's config folder. Flags override an image's own metadata (--from-image), which overrides the profile, which
overrides "default"."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `config show`, `config init` and `config path` with their flags."""
    parser = commands.add_parser("config", help="show, write or find config.toml", description=DESCRIPTION,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print every setting, its value and where it came from")
    show.add_argument("--json", action="store_true", help="print JSON; unset settings are null")
    _add(show, "config", "profile")
    show.set_defaults(act=_show)
    init = actions.add_parser("init", help="write a config.toml in which every setting is explained and none is set")
    init.add_argument("path", nargs="?", metavar="PATH", help="a new file (default: config.toml in "
                      "the platform's config folder)")  # fmt: skip
    init.set_defaults(act=_init)
    path = actions.add_parser("path", help="print the path of the file in force")
    _add(path, "config")
    path.set_defaults(act=_path)
    return parser


def _add(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        add_option(parser, rows()[name])


def run(arguments: argparse.Namespace) -> None:
    """Runs `show`, `init` or `path`."""
    arguments.act(arguments)


def _show(arguments: argparse.Namespace) -> None:
    settings = load_settings(find_config(arguments.config), arguments.profile)
    rows = [(f"{row.table}.{row.key}".lstrip("."), row) for row in SCHEMA]
    if arguments.json:
        values = {name: {"value": settings[row.key], "origin": settings.origins[row.key]} for name, row in rows}
        file = None if settings.path is None else str(settings.path)
        facts = {"file": file, "profile": settings.profile, "settings": values}
        print(json_text(facts))
        return
    print_table([
        (name, row.usual if settings[row.key] is None else _as_json(settings[row.key]), settings.origins[row.key])
        for name, row in rows
    ])  # fmt: skip


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _init(arguments: argparse.Namespace) -> None:
    from ..files import named_path, new_file

    path = default_place() if arguments.path is None else named_path(arguments.path, "PATH")
    if os.path.lexists(path):
        raise OutputError(f"{path} already exists and was not overwritten")
    print(new_file(path, example_config().encode()))


def _path(arguments: argparse.Namespace) -> None:
    path = find_config(arguments.config)
    if path is None:
        raise RequestError("no config.toml is in force; qwen-image-mlx config init writes one")
    print(path)


def config_options(arguments: argparse.Namespace, command: str, recorded: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The settings of the config for a command, keyed by flag name; flags override them.

    Settings that belong together are used or ignored together: --lightning decides how its LoRA is sampled.

    Args:
        arguments: the flags.
        command: a key of `Setting.feeds`.
        recorded: the metadata of an image that is generated again; it overrides the config.

    Raises:
        RequestError: the config is wrong, or has no such profile.
    """
    settings = load_settings(find_config(arguments.config), arguments.profile)
    values = settings.of_command(command, arguments.model or recorded.get("model"))
    left = set(recorded)
    if getattr(arguments, "lightning", None):
        left |= {"steps", "cfg_scale"}
    if getattr(arguments, "preset", None):
        left |= GOVERNED
    return {name: value for name, value in values.items() if name not in left}
