"""qwen-image-mlx calibrate-cache: measure a model for step caches."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..variants import DEFAULT_MODEL
from .flags import add_option, rows_of

logger: logging.Logger = logging.getLogger(__name__)

COMMAND = "calibrate-cache"
DESCRIPTION = """\
Measure what TeaCache and MagCache need to know of a model with its LoRAs: how much each step changes, over a few whole
images. The numbers are written into the user's data folder, where `--step-cache teacache` and `magcache` find them for
the same model and LoRAs. Takes as long as generating these images without a cache."""
_PROMPTS = (
    "a photo of a cat on a sofa by a window, morning light",
    "a mountain lake at sunset, oil painting",
    'a shop window with the sign "OPEN", street photography at night',
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        COMMAND, help="measure a model for --step-cache", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for row in rows_of("generate"):
        if row.group == "model" or row.name in ("memory", "cfg_scale", "quiet"):
            add_option(parser, row)
    add = parser.add_argument
    add("--prompt", "-p", action="append", metavar="PROMPT", help="a prompt of the measured images; repeat for more "
        "(default: three)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="steps of each image (default: 50)")
    add("--size", metavar="WxH", help="size of the images (default: the model's own at half the side)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measures, writes the numbers and prints their file's path."""
    from ..errors import RequestError
    from ..images.geometry import size_of_area
    from ..pipeline.calibration import STEPS, calibrate, write_facts
    from ..pipeline.limits import limits
    from ..pipeline.request import parse_size
    from ..runtime.session import Session
    from .console import Console

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    with Console(arguments) as console:
        session = Session.open(options, DEFAULT_MODEL, console, task="generate")
        pipeline = session.pipeline
        size: Any = size_of_area(pipeline.variant.target_area // 4, (1, 1))
        if arguments.size is not None:
            size = parse_size(arguments.size, "--size")
            if isinstance(size, str):
                raise RequestError(f"--size is {arguments.size}, but must be WIDTHxHEIGHT here")
        if session.is_distilled:
            logger.warning("%s takes so few steps that step caches are refused", pipeline.model)
        with limits():
            path = write_facts(pipeline, calibrate(
                pipeline, arguments.prompt or _PROMPTS, width=size[0], height=size[1],
                steps=STEPS if arguments.steps is None else arguments.steps, cfg_scale=arguments.cfg_scale,
            ))  # fmt: skip
        logger.info("from now on --step-cache teacache and magcache use these numbers for %s", pipeline.model)
        console.result(path)
