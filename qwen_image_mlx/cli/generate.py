"""qwen-image-mlx generate: text to image, image to image, inpainting."""

from __future__ import annotations

import argparse
from typing import Any

from ..variants import ASPECT_SIZES, DEFAULT_MODEL
from .batch import add_batch_flags, is_batch, run_batch
from .painting import add_flags, run_painting


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    sizes = ", ".join(f"{aspect} {w}x{h}" for aspect, (w, h) in ASPECT_SIZES.items())
    parser = commands.add_parser(
        "generate",
        help="paint a picture from a prompt",
        description="Paint a picture from a prompt, or paint one over, and save it as PNG; stdout gets its path.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to paint; may be empty")
    parser.add_argument("--image", dest="images", action="append", metavar="IMAGE", help="a picture to start from")
    parser.add_argument("--aspect", choices=ASPECT_SIZES, help=f"an official size instead: {sizes} (default: 1:1)")
    add_flags(parser, DEFAULT_MODEL, steps=50)
    add_batch_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Paints and saves every picture asked for."""
    if is_batch(arguments):
        run_batch(arguments, DEFAULT_MODEL)
    else:
        run_painting(arguments, DEFAULT_MODEL, task="generate")
