"""qwen-image-mlx edit: change pictures by instruction."""

from __future__ import annotations

import argparse
from typing import Any

from ..variants import DEFAULT_EDIT_MODEL
from .painting import add_flags, run_painting


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "edit",
        help="change pictures by instruction",
        description="Change one or more pictures by instruction and save the result as PNG; stdout gets its path.",
    )
    parser.add_argument("prompt", nargs="?", metavar="INSTRUCTION", help="what to change; may be empty")
    parser.add_argument("--image", "-i", dest="images", action="append", metavar="IMAGE",
                        help="a picture to work on; repeat for more, the order counts")  # fmt: skip
    parser.add_argument("--layer", metavar="DIR:N", help="instead, layer N of a folder that decompose wrote (which "
                        "takes the result in its place, unless --output is given), PSD or ORA")  # fmt: skip
    add_flags(parser, DEFAULT_EDIT_MODEL, steps=40)
    parser.add_argument("--reference-pixels", type=int, metavar="N",
                        help="show at most N pixels of each picture to the model (default: about 1 MP)")  # fmt: skip
    parser.add_argument(
        "--keep-alpha", action="store_true", default=None, help="give the result the picture's transparency"
    )
    parser.add_argument("--zero-cond-t", choices=("on", "off"), help="override the transformer's flag, for files that "
                        "lost it")  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Edits and saves every picture asked for."""
    run_painting(arguments, DEFAULT_EDIT_MODEL, task="edit")
