"""qwen-image-mlx decompose: take a picture apart into layers."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RequestError
from ..pipeline.parameters import MAX_LAYERS, RNGS
from ..variants import CAPTION_TEMPLATES, DEFAULT_LAYERED_MODEL, LAYERED_RESOLUTIONS
from .config import configured, wants_timings
from .painting import add_cache_flag, add_colour_flag, add_model_flags, add_painter_flags
from .words import RANDOM, draw_seed, filled, read_prompt

if TYPE_CHECKING:
    from ..pipeline.decomposition import LayeredResult


logger = logging.getLogger(__name__)

# Flags and what they set; what neither they nor the config say is as `layers_request` has it, or the model.
_FIELDS = {"layers": "num_layers"} | {
    name: name for name in ("negative_prompt", "resolution", "size", "cfg_normalize", "caption_language", "rng")
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "decompose",
        help="take a picture apart into layers",
        description="Take a picture apart into RGBA layers, from back to front, in a folder of their own; stdout gets "
        "the folder, and how near the layers laid together come to the picture.",
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="PHOTO", help="the picture to take apart")
    add("--layer", metavar="DIR:N", help="instead, layer N of a folder, PSD or ORA")
    add_model_flags(parser, DEFAULT_LAYERED_MODEL)
    add_painter_flags(parser)
    add("--prompt", help="what the whole picture shows (default: the model's own caption)")
    add("--negative-prompt", "-n", metavar="N", help='what to avoid (default: " ")')
    add("--layers", type=int, metavar="N", help=f"1 to {MAX_LAYERS} (default: 4)")
    add("--resolution", type=int, metavar="|".join(map(str, LAYERED_RESOLUTIONS)),
        help="the model works at so many pixels squared, at the picture's aspect (default: 640)")  # fmt: skip
    add("--size", metavar="source|bucket", help="of the layers: the picture's or the model's "
        "(default: source)")  # fmt: skip
    add("--steps", type=int, help="denoising steps (default: 50)")
    add("--cfg-scale", "-g", type=float, metavar="S", help="guidance; 1 turns it off (default: 4.0)")
    add("--cfg-normalize", action="store_true", help="guidance keeps the length of each token's velocity")
    add("--caption-language", choices=CAPTION_TEMPLATES, help="of the model's own caption (default: en)")
    add("--seed", "-s", type=int, metavar="N", help="of the noise; -1 is a random one (default: random)")
    add("--rng", choices=RNGS, help=f"whose noise a seed stands for (default: {RNGS[0]})")
    add("--format", default="png", metavar="F,F", help="png, psd, ora, zip, pptx (default: png)")
    add("--output", "-o", metavar="DIR", help="folder for the layers (default: named after the picture)")
    add_cache_flag(parser)
    add_colour_flag(parser)
    return parser


def _save(result: LayeredResult, wanted: Path, formats: Sequence[str]) -> Path:
    """Saves into the first free folder, which another run may have taken meanwhile."""
    from ..images.layer_files import free_folder, is_free

    while True:
        folder = free_folder(wanted)
        try:
            result.save(folder, formats)
        except OutputError:
            if is_free(folder):
                raise
        else:
            return folder


def run(arguments: argparse.Namespace) -> None:
    """Takes one picture apart and saves its layers."""
    from ..images.files import check_writable, named_path
    from ..images.layer_files import check_formats
    from ..images.recompose import open_layer
    from ..images.sources import open_rgba
    from ..pipeline.decomposition import layers_request
    from .console import messages

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    read_prompt(given)
    wanted = {**configured(arguments, "decompose"), **given}
    if drawn := wanted.get("seed", RANDOM) == RANDOM:
        wanted["seed"] = draw_seed()
    if (arguments.image is None) == (arguments.layer is None):
        raise RequestError("give one picture: PHOTO, or --layer DIR:N")
    name = Path(arguments.layer.replace(":", "-") if arguments.image is None else arguments.image).stem
    with messages():
        picture = open_rgba(arguments.image) if arguments.layer is None else open_layer(arguments.layer).image
    formats = check_formats(arguments.format.split(","))
    sampling = {"num_inference_steps": wanted.get("steps"), "cfg_scale": wanted.get("cfg_scale")}
    ask = partial(
        layers_request, picture, wanted.get("prompt", ""), seed=wanted["seed"],
        **{field: wanted[name] for name, field in _FIELDS.items() if name in wanted},
    )  # fmt: skip
    draft = ask(
        resolutions=(wanted.get("resolution") or LAYERED_RESOLUTIONS[0],),
        sampling={name: value for name, value in sampling.items() if value is not None},
    )
    folder = named_path(
        f"{name}-layers" if arguments.output is None else filled(arguments.output, wanted["seed"]), "--output"
    )
    width, height = draft.canvas.result_size
    check_writable(folder / "layer_0.png", nbytes=4 * width * height * (draft.parameters.num_layers + 2) * len(formats))

    from ..runtime.asking import open_pipeline, say_what_is_ignored, settled
    from ..runtime.cache import EncodingCache
    from ..runtime.preview import Preview
    from ..runtime.profile import Profile
    from ..runtime.session import decompose
    from .console import ProgressBars
    from .preview import preview_file

    with messages(), ProgressBars() as bars, ExitStack() as stack:
        profile = Profile(bars) if wants_timings(arguments) else None
        pipeline = open_pipeline(wanted, DEFAULT_LAYERED_MODEL, profile or bars)
        pipeline.check_task("decompose")
        request = ask(resolutions=pipeline.variant.resolutions, sampling=pipeline.recommended.unless(**sampling))
        say_what_is_ignored([(wanted, request)])
        if drawn:
            logger.info("seed %d", wanted["seed"])
        plan = stack.enter_context(
            settled(pipeline, request, wanted.get("memory"), force=bool(arguments.force), wire=bool(arguments.wire))
        )
        cache = EncodingCache() if arguments.cache else None
        watch = profile or bars
        if arguments.preview:
            watch = Preview(stack.enter_context(preview_file(folder)), watch, pipeline, request)
        result = decompose(pipeline, request, watch, cache, plan.residency)
        bars.close()
        if profile:
            result.stack.metadata["profile"] = profile.record()
            logger.info("%s", profile.table())
        print(_save(result, folder, formats))
        print(f"PSNR {result.psnr:.2f} dB")
