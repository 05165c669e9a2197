"""qwen-image-mlx edit: change images by instruction."""

from __future__ import annotations

import argparse
from typing import Any

from ..variants import DEFAULT_EDIT_MODEL
from .flags import add_options
from .images import run_images

SHARES = True  # all ranks run it


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "edit",
        help="change images by instruction",
        description="Edit one or more images by instruction and save the result as PNG; its path is printed on stdout.",
    )
    add_options(parser, "edit")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Edits and saves every image."""
    run_images(arguments, DEFAULT_EDIT_MODEL, task="edit")
