"""qwen-image-mlx decompose: decompose an image into layers."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RequestError
from ..variants import DEFAULT_LAYERED_MODEL
from .config import config_options
from .flags import add_options
from .idle import warn_idle
from .output import check_output
from .words import RANDOM, draw_seed, fill_placeholders, read_prompt

if TYPE_CHECKING:
    from ..pipeline.decomposition import LayeredResult


logger: logging.Logger = logging.getLogger(__name__)

SHARES = True  # all ranks run it


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "decompose",
        help="decompose an image into layers",
        description="Decompose an image into RGBA layers, from back to front, in a new folder; stdout gets the folder "
        "and how close the composite of the layers is to the image.",
    )
    add_options(parser, "decompose")
    return parser


def _save(result: LayeredResult, path: Path, formats: Sequence[str]) -> Path:
    """Saves into the first free folder; tries the next one if another run has taken it meanwhile."""
    from ..layers.formats import free_folder, is_free

    while True:
        folder = free_folder(path)
        try:
            result.save(folder, formats)
        except OutputError:
            if is_free(folder):
                raise
        else:
            return folder


def run(arguments: argparse.Namespace) -> None:
    """Decomposes one image and saves its layers."""
    from ..files import named_path
    from ..images.sources import open_rgba
    from ..layers.formats import check_formats
    from ..layers.recompose import open_layer
    from .console import Console, messages

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    read_prompt(given)
    options = {**config_options(arguments, "decompose"), **given}
    if drawn := options.get("seed", RANDOM) == RANDOM:
        options["seed"] = draw_seed()
    if (arguments.image is None) == (arguments.layer is None):
        raise RequestError("give one image: PHOTO, or --layer DIR:N")
    name = Path(arguments.layer.replace(":", "-") if arguments.image is None else arguments.image).stem
    with messages():
        image = open_rgba(arguments.image) if arguments.layer is None else open_layer(arguments.layer).image
    formats = check_formats(["png"] if arguments.format is None else arguments.format.split(","))

    from ..runtime.session import Session, layers_draft
    from .preview import preview_file

    draft = layers_draft(image, options)
    named = fill_placeholders(arguments.output, seed=options["seed"], prompt=options.get("prompt"))
    folder = named_path(f"{name}-layers" if named is None else named, "--output")
    width, height = draft.canvas.result_size
    check_output(folder / "layer_0.png", nbytes=4 * width * height * (draft.parameters.num_layers + 2) * len(formats))

    with Console(arguments) as console, ExitStack() as stack:
        timings = console.timings(bool(arguments.timings))
        session = Session.open(options, DEFAULT_LAYERED_MODEL, timings or console, task="decompose")
        request = session.request(options, images=[image])
        warn_idle("decompose", given, request)
        if drawn:
            logger.info("seed %d", options["seed"])
        show = stack.enter_context(preview_file(folder)) if arguments.preview else None
        result = session.decompose(request, show)
        console.close()
        if result is None:  # this rank is not the first
            return
        if arguments.timings:
            result.stack.metadata["profile"] = timings.record()
        if timings:
            logger.info("%s", timings.table())
        saved, psnr = _save(result, folder, formats), result.psnr
        console.result(
            saved, f"PSNR {psnr:.2f} dB", seed=options["seed"], prompt=result.prompt,
            psnr=round(psnr, 2) if math.isfinite(psnr) else None,
        )  # fmt: skip
