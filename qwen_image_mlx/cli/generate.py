"""qwen-image-mlx generate: text to image, image to image, inpainting."""

from __future__ import annotations

import argparse
from typing import Any

from ..variants import DEFAULT_MODEL
from .batch import is_batch, run_batch
from .flags import add_options
from .images import run_images

SHARES = True  # all ranks run it


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "generate",
        help="generate an image from a prompt",
        description="Generate an image from a prompt, or from an image and a prompt, and save it as PNG; its path is "
        "printed on stdout.",
    )
    add_options(parser, "generate")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Generates and saves every image."""
    if is_batch(arguments):
        run_batch(arguments, DEFAULT_MODEL)
    else:
        run_images(arguments, DEFAULT_MODEL, task="generate")
