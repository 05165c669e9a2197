"""qwen-image-mlx caption: write a caption of an image."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..outside import MAX_CHARACTERS, printable
from ..runtime.options import OPTIONS
from ..variants import DEFAULT_LAYERED_MODEL, LAYERED_RESOLUTIONS
from .config import config_options
from .flags import add_options
from .words import RANDOM, draw_seed

logger: logging.Logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "caption",
        help="write a caption of an image",
        description="Describe an image with the language model of a checkpoint, as decompose does without a prompt; "
        "the caption is printed on stdout.",
    )
    add_options(parser, "caption")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the caption."""
    from ..images.sources import open_rgba
    from ..pipeline.parameters import check_seed

    drawn = arguments.seed == RANDOM
    seed = draw_seed() if drawn else check_seed(arguments.seed or 0)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {**config_options(arguments, "caption"), **given}

    from .console import Console, event, messages

    with messages():
        image = open_rgba(arguments.image)

    from ..runtime.session import Session

    with Console(arguments) as console:
        session = Session.open(options, DEFAULT_LAYERED_MODEL, console)
        caption = session.pipeline.caption_image(
            image, language=arguments.language or OPTIONS["language"].default,
            resolution=arguments.resolution or LAYERED_RESOLUTIONS[0], seed=seed,
        )  # fmt: skip
        console.close()
        if drawn:
            logger.info("seed %d", seed)
        if arguments.json:
            event("result", caption=caption, seed=seed)
        else:
            print(printable(caption, MAX_CHARACTERS))
