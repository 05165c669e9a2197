"""qwen-image-mlx caption: a picture in words."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..outside import MAX_CHARACTERS, printable
from ..variants import CAPTION_TEMPLATES, DEFAULT_LAYERED_MODEL, LAYERED_RESOLUTIONS
from .config import add_config_flags, configured
from .painting import add_colour_flag, add_model_flags
from .words import RANDOM, draw_seed

logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "caption",
        help="describe a picture in words",
        description="Describe a picture with the language model of a checkpoint, as decompose does without a prompt; "
        "stdout gets the caption.",
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture to describe")
    add_model_flags(parser, DEFAULT_LAYERED_MODEL)
    add_config_flags(parser)
    add_colour_flag(parser)
    parser.add_argument("--language", choices=CAPTION_TEMPLATES, default="en", help="default: en")
    parser.add_argument("--resolution", type=int, choices=LAYERED_RESOLUTIONS, default=LAYERED_RESOLUTIONS[0],
                        help="show it at about this side squared, in pixels (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", "-s", type=int, default=0, metavar="N",
                        help="of the draws, where the checkpoint asks for sampling (default: 0)")  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the caption."""
    from ..images.sources import open_rgba
    from ..pipeline.parameters import check_seed

    seed = draw_seed() if arguments.seed == RANDOM else check_seed(arguments.seed)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    wanted = {**configured(arguments, "caption"), **given}

    from .console import ProgressBars, messages

    with messages():
        picture = open_rgba(arguments.image)

    from ..runtime.asking import open_pipeline

    with messages(), ProgressBars() as bars:
        pipeline = open_pipeline(wanted, DEFAULT_LAYERED_MODEL, bars)
        caption = pipeline.caption_image(
            picture, language=arguments.language, resolution=arguments.resolution, seed=seed
        )
        bars.close()
        if arguments.seed == RANDOM:
            logger.info("seed %d", seed)
        print(printable(caption, MAX_CHARACTERS))
