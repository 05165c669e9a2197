"""qwen-image-mlx compose: composite layers into an image again."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..variants import DEFAULT_EDIT_MODEL
from .flags import COMPOSITION, add_options, rows_of
from .images import run_images
from .output import output_path
from .words import fill_placeholders

if TYPE_CHECKING:
    from PIL.Image import Image

# Options that have an effect without a model.
_BARE = ("output", "ignore_profile", "quiet", "verbose", "json")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "compose",
        help="composite layers into an image again",
        description="Composite layers, from back to front, and save the image as PNG; its path is printed on stdout.",
    )
    add = parser.add_argument
    add("layers", metavar="DIR|PSD|ORA", help="a folder that decompose wrote, its zip, a PSD or an ORA")
    add("--hide", type=int, action="append", default=[], metavar="N", help="leave layer N out; repeat for more")
    add("--move", action="append", default=[], metavar="N:X,Y", help="move layer N, right and down by pixels, as in "
        "3:+40,-10; repeat for more")  # fmt: skip
    add("--scale", action="append", default=[], metavar="N:F", help="scale the content of layer N about its centre; "
        "repeat for more")  # fmt: skip
    add("--harmonize", metavar="PROMPT", help='let an editing model blend the result, as in "match light and shadows"')
    add_options(parser, "compose", heading="with --harmonize", bare=_BARE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Composites the layers; with --harmonize, an editing model then edits the result."""
    from ..images.files import OPAQUE, save_image
    from ..layers.recompose import compose

    blending = {
        row.flag for row in rows_of("compose") if row.name not in _BARE and getattr(arguments, row.name) is not None
    }
    if arguments.harmonize is None and blending:
        raise RequestError(f"{min(blending)} needs --harmonize")
    path = output_path(fill_placeholders(arguments.output), COMPOSITION)
    changes = {
        "hide": arguments.hide,
        "move": _by_layer("--move", arguments.move, int, 2),
        "scale": _by_layer("--scale", arguments.scale, float, 1),
    }
    made_from = {"layers": arguments.layers} | {name: getattr(arguments, name) for name in changes}

    from .console import Console

    with Console(arguments) as console:
        image = compose(arguments.layers, **changes)
        if arguments.harmonize is None:
            console.result(save_image(image, path, made_from), metadata=made_from)
            return
        composed, there = _compose(image, path.with_name(f"{path.stem}-composed.png"), made_from)
    edit = {
        "prompt": arguments.harmonize,
        "images": [str(composed)],
        "size": "source",
        "keep_alpha": path.suffix.lower() not in OPAQUE,
        "output": str(path),
    }
    try:
        run_images(argparse.Namespace(**{**vars(arguments), **edit}), DEFAULT_EDIT_MODEL, "edit", command="compose")
    except BaseException:
        if not there:
            composed.unlink()
        raise


def _compose(image: Image, path: Path, made_from: dict[str, Any]) -> tuple[Path, bool]:
    """The composite's file, and whether an earlier run already wrote the same one."""
    from ..images.files import encode_png, save_png

    if path.is_file() and path.read_bytes() == encode_png(image, made_from):
        return path, True
    return save_png(image, path, made_from), False


def _by_layer(flag: str, texts: list[str], kind: type, count: int) -> dict[int, Any]:
    numbered = [_parse_numbered(text, flag, kind, count) for text in texts]
    if len(dict(numbered)) < len(numbered):
        raise RequestError(f"{flag} is given twice for one layer; give their sum once")
    return dict(numbered)


def _parse_numbered(text: str, flag: str, kind: type, count: int) -> tuple[int, Any]:
    """(layer, value or values) of N:V or N:V,V."""
    number, _, values = text.partition(":")
    try:
        numbers = tuple(kind(value) for value in values.split(","))
        if len(numbers) == count and re.fullmatch(r"\d+", number):
            return int(number), numbers if count > 1 else numbers[0]
    except ValueError:
        pass
    example = {"--move": "3:+40,-10", "--scale": "3:0.5"}[flag]
    raise RequestError(f"{flag} is {text!r}, but must be a layer and by how much, as in {example}")
