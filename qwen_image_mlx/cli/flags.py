"""Flags, made from the table of options and from those that only the command line has."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import cache
from typing import Any, get_args

from ..names import LayersFormat
from ..options import Choice, Group, Integer, Option, Several, Switch, Text, by_name, options_of
from ..pipeline.parameters import CANVAS, IMAGE_COMMANDS
from ..runtime.options import OPTIONS

FOLDER = "qwen-images"  # of many images
COMPOSITION = "composition.png"
# Headings of help, by `Option.group`, in their order.
_HEADINGS = {
    "image": "image",
    "size": "size",
    "sampling": "sampling",
    "image to image": "image to image and inpainting",
    "control": "control by an image",
    "layers": "layers",
    "many": "many images",
    "model": "model",
    "memory": "speed and memory",
    "output": "output",
    "settings": "settings",
    "shown": "messages and progress",
}
_SHOWS = (*IMAGE_COMMANDS, "caption")
_SETTLED = (*IMAGE_COMMANDS, "caption", "train", "plan", "serve")
_LINES = ", ".join(row.name for row in OPTIONS.values() if row.line and row.name != "prompt")

_OWN = (
    Option(
        name="prompts_file", kind=Text(), group="many", commands=("generate",), flags=("--prompts-file",),
        metavar="FILE",
        help="generate every prompt of a .txt file (one a line; empty lines and those with # are skipped) or a .jsonl "
        f"file (objects with prompt and any of {_LINES}, which override the flags; the default seed is 0) into "
        f"the folder --output (default: ./{FOLDER}); a second run generates the missing images",
    ),
    Option(
        name="seeds", kind=Text(), group="many", commands=("generate",), flags=("--seeds",), metavar="A-B,C",
        help="generate one prompt or all prompts with each of these seeds, such as 1-20 or 1,5,9-12, into a folder",
    ),
    Option(
        name="contact_sheet", kind=Switch(), group="many", commands=("generate",), flags=("--contact-sheet",),
        help="with --seeds or --prompts-file, also show all images on one, contact-sheet.png, from which --from-image "
        "and --pick generate one again",
    ),
    Option(
        name="pick", kind=Integer(1), group="settings", commands=("generate",), flags=("--pick",), metavar="N",
        help="with --from-image, the number of the image on a contact sheet",
    ),
    Option(
        name="force", kind=Switch(), group="memory", commands=IMAGE_COMMANDS, flags=("--force",),
        help="generate even if the plan does not fit in memory",
    ),
    Option(
        name="wire", kind=Switch(), group="memory", commands=IMAGE_COMMANDS, flags=("--wire",),
        help="keep macOS from paging out memory in use; may help with 64 GB and more, and makes macOS panic on some "
        "machines",
    ),
    Option(
        name="cache", kind=Switch(), group="memory", commands=IMAGE_COMMANDS, flags=("--cache",),
        help="keep encoded prompts and images for next time, at most 2 GB, in ~/.cache/qwen-image-mlx; removing that "
        "folder is safe",
    ),
    Option(
        name="output", kind=Text(), group="output", commands=IMAGE_COMMANDS, flags=("--output", "-o"), metavar="PATH",
        help="PNG file or directory", usual="./qwen-image.png",
        but={"decompose": {"metavar": "DIR", "help": "folder for the layers", "usual": "named after the image"},
             "compose": {"usual": f"./{COMPOSITION}"}},
    ),
    Option(
        name="format", kind=Text(), group="output", commands=("decompose",), flags=("--format",), metavar="F,F",
        help=", ".join(get_args(LayersFormat)), usual="png",
    ),
    Option(
        name="preview", kind=Switch(), group="output", commands=IMAGE_COMMANDS, flags=("--preview",),
        help="during generation, keep a small preview image next to the output",
    ),
    Option(
        name="from_image", kind=Text(), group="settings", commands=CANVAS, flags=("--from-image",), metavar="IMAGE",
        help="generate an image again from its own metadata; flags override it",
    ),
    Option(
        name="config", kind=Text(), group="settings", commands=_SETTLED, flags=("--config",), metavar="PATH",
        help="a config.toml (default: see qwen-image-mlx config --help)",
    ),
    Option(
        name="profile", kind=Text(), group="settings", commands=_SETTLED, flags=("--profile",), metavar="NAME",
        help="use the config's profile NAME", usual="default",
    ),
    Option(
        name="quiet", kind=Switch(), group="shown", commands=_SHOWS, flags=("--quiet",),
        help="show warnings only, no progress and no other messages; results still go to stdout",
    ),
    Option(
        name="verbose", kind=Switch(), group="shown", commands=_SHOWS, flags=("--verbose",),
        help="also show all options in force, and the time and memory of each stage",
    ),
    Option(
        name="json", kind=Switch(), group="shown", commands=_SHOWS, flags=("--json",),
        help="for apps: print progress, messages and results on stdout as JSON, one event a line",
    ),
    Option(
        name="timings", kind=Switch(), group="shown", commands=IMAGE_COMMANDS, flags=("--timings",),
        help="print the time and memory of each stage, and record them",
    ),
)  # fmt: skip


_EXAMPLES = {
    "generate": (
        'generate "A red fox in fresh snow" --aspect 16:9 --seed 42',
        'generate "A red fox" --model 2512 --lightning 8 --output fox.webp',
        'generate "An oil painting" --image sketch.png --strength 0.7',
        "generate --from-image qwen-image.png --steps 20",
    ),
    "edit": (
        'edit "Make the coat green" --image portrait.jpg --size source --output green.png',
        'edit "Put the cat on the sofa" --image sofa.jpg --image cat.png',
        'edit "A straw hat" --image portrait.jpg --mask hat-mask.png',
    ),
    "decompose": (
        "decompose lake.png --layers 4 --format png,ora",
        "decompose --layer lake-layers:2 --layers 2",
        'decompose lake.png --prompt "A boat on a lake" --resolution 1024',
    ),
    "compose": (
        "compose lake-layers --move 3:+40,-10 --output moved.png",
        'compose lake-layers --hide 2 --harmonize "match light and shadows"',
    ),
    "caption": ("caption lake.png", "caption lake.png --language zh"),
}


@cache
def rows() -> dict[str, Option]:
    """The options of all commands, keyed by name."""
    return by_name([*OPTIONS.values(), *_OWN])


def rows_of(command: str) -> list[Option]:
    """The options of a command, with what differs for it."""
    return [row.of(command) for row in rows().values() if command in row.commands]


def flag_of(name: str) -> str:
    """The long flag of an option, such as --mask-padding."""
    return rows()[name].flag


def add_options(parser: argparse.ArgumentParser, command: str, heading: str = "", bare: Iterable[str] = ()) -> None:
    """Adds the flags of a command, under headings. Every default is None, so a value always comes from the user.

    Args:
        parser: the command's.
        command: its name.
        heading: a single heading for all of them; "" gives each group its own.
        bare: names of options without a heading.
    """
    found = rows_of(command)
    if command in _EXAMPLES:
        parser.epilog = "\n".join(["examples:", *(f"  qwen-image-mlx {line}" for line in _EXAMPLES[command])])
    titles = dict.fromkeys(_HEADINGS[row.group] for row in sorted(found, key=lambda row: [*_HEADINGS].index(row.group)))
    groups = {title: parser.add_argument_group(title) for title in ([heading] if heading else titles)}
    for row in found:
        loose = not row.flags or row.name in bare
        add_option(parser if loose else groups[heading or _HEADINGS[row.group]], row)


def add_option(place: argparse._ActionsContainer, row: Option) -> None:
    """Adds one flag or one positional argument."""
    keywords: dict[str, Any] = {"help": _help(row), "default": None}
    kind = row.kind.kind if isinstance(row.kind, Several) else row.kind
    if isinstance(kind, Group):
        _add_group(place, row.name, kind)
        return
    if isinstance(kind, Switch):
        keywords["action"] = "store_true"
    else:
        if row.nargs == "append":
            keywords["action"] = "append"
        elif row.nargs:
            keywords["nargs"] = row.nargs
            if row.bare is not None:
                keywords["const"] = row.bare
        if row.metavar:
            keywords["metavar"] = row.metavar
        if isinstance(kind, Choice):
            keywords["choices"] = kind.values
            keywords["type"] = type(kind.values[0])
        elif kind.read:
            keywords["type"] = kind.read
    if keywords.get("type") is str:
        del keywords["type"]
    if row.flags:
        place.add_argument(*row.flags, dest=row.name, **keywords)
    elif row.instead:  # a positional argument, or a flag
        place.add_argument(row.name, **keywords | {"action": _Once, "default": argparse.SUPPRESS})
        place.add_argument(*row.instead, dest=row.name, action=_Once, metavar=row.metavar, help="the same as a flag")
    else:
        place.add_argument(row.name, **keywords)


def _add_group(place: argparse._ActionsContainer, name: str, kind: Group) -> None:
    """Adds the flags of a group that may be repeated: the first begins one, the others belong to the one before."""
    first, *_ = rows = [*options_of(kind.of)]
    for row in rows:
        keywords: dict[str, Any] = {"help": _help(row), "metavar": row.metavar}
        if isinstance(row.kind, Choice):
            keywords |= {"choices": row.kind.values}
        elif row.kind.read:
            keywords |= {"type": row.kind.read}
        place.add_argument(*row.flags, dest=name, action=_Grouped, const=(first.flag, row.name), **keywords)


class _Grouped(argparse.Action):
    """Stores a value in the last object of a list; the group's first flag begins a new object."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        (first, name), groups = self.const, [*(getattr(namespace, self.dest, None) or ())]
        if option_string == first:
            groups.append({})
        elif not groups:
            parser.error(f"{option_string} belongs to a {first}, which is given before it")
        elif name in groups[-1]:
            parser.error(f"{option_string} is given twice for {groups[-1]['controlnet']}: repeat {first}")
        else:
            groups[-1] = {**groups[-1]}
        groups[-1][name] = values
        setattr(namespace, self.dest, groups)


class _Once(argparse._StoreAction):
    """Stores a value that may be given once, as an argument or by its flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"the {self.dest} is given twice: {getattr(namespace, self.dest)!r:.40} and {values!r:.40}")
        setattr(namespace, self.dest, values)


def _help(row: Option) -> str:
    text = row.help + (f" (default: {row.usual})" if row.usual else "")
    return text.strip().replace("%", "%%")
