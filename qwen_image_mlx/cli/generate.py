"""qwen-image-mlx generate: text to image."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from typing import Any

from ..errors import RequestError
from ..pipeline.parameters import DTYPES, RNGS, GenerationParameters
from ..runtime.request import Request
from ..variants import ASPECT_SIZES, DEFAULT_MODEL, recommended_negative_prompt


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags; every default is None, so that a flag given is a flag meant."""
    sizes = ", ".join(f"{aspect} {w}x{h}" for aspect, (w, h) in ASPECT_SIZES.items())
    parser = commands.add_parser(
        "generate",
        help="paint a picture from a prompt",
        description="Paint a picture from a prompt and save it as PNG; its path is printed on stdout.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to paint; may be empty")
    parser.add_argument("--model", "-m", help=f"a local directory or a Hugging Face id (default: {DEFAULT_MODEL})")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face model")
    parser.add_argument(
        "--negative-prompt", "-n", metavar="N", help="what to avoid (default: as the model's card says)"
    )
    parser.add_argument("--width", "-W", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--height", "-H", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--aspect", choices=ASPECT_SIZES, help=f"an official size instead: {sizes} (default: 1:1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    parser.add_argument("--cfg-scale", "-g", type=float, metavar="S", help="guidance; 1 turns it off (default: 4.0)")
    parser.add_argument("--seed", "-s", type=int, nargs="+", metavar="N", help="one picture per seed (default: random)")
    parser.add_argument("--num-images", type=int, metavar="N", help="pictures per seed (default: 1)")
    parser.add_argument("--output", "-o", metavar="PATH", help="PNG file or directory (default: ./qwen-image.png)")
    parser.add_argument("--dtype", choices=DTYPES, help="of text encoder and transformer (default: bfloat16)")
    parser.add_argument("--rng", choices=RNGS, help="whose noise a seed stands for: PyTorch's on the CPU, or MLX's "
                        "(default: torch)")  # fmt: skip
    parser.add_argument("--from-image", metavar="IMAGE", help="paint a picture again from its own metadata; flags win")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Paints and saves every picture asked for."""
    from ..images.files import check_writable, output_path, read_metadata, save_png

    recorded = _checked(read_metadata(arguments.from_image)) if arguments.from_image is not None else {}
    wanted = {**recorded, **{k: v for k, v in vars(arguments).items() if v is not None}, **_size(arguments, recorded)}
    wanted.setdefault("seed", secrets.randbelow(2**32))  # as many bits as torch's generator uses
    # Everything that can be wrong without the model is found before it is touched.
    request = build_request(wanted)
    path = output_path(arguments.output)
    check_writable(path, nbytes=3 * request.parameters.width * request.parameters.height)

    from ..pipeline.pipeline import QwenImagePipeline
    from ..runtime.session import paint
    from .console import ProgressBars, show_messages

    show_messages()
    with ProgressBars() as bars:
        pipeline = QwenImagePipeline.from_pretrained(
            wanted.get("model", DEFAULT_MODEL),
            # A revision recorded for one model means nothing for another.
            revision=wanted.get("revision") if arguments.model is None else arguments.revision,
            dtype=wanted.get("dtype", DTYPES[0]),
            progress=bars,
        )
        recommended = {
            "steps": pipeline.variant.steps,
            "cfg_scale": pipeline.variant.cfg_scale,
            "negative_prompt": recommended_negative_prompt(pipeline.variant, pipeline.model),
        }
        for painting in paint(pipeline, build_request({**recommended, **wanted}), bars):
            bars.close()
            print(save_png(painting.image, path, painting.metadata), flush=True)


def build_request(wanted: Mapping[str, Any]) -> Request:
    """What the flags, the recorded picture and the model's recommendations add up to; raises RequestError."""
    if wanted.get("prompt") is None:
        raise RequestError("a prompt is missing: give one in quotes, or --from-image")
    settings = {field: wanted[name] for name, field in _PARAMETERS.items() if wanted.get(name) is not None}
    seed = wanted["seed"]  # a list from the flags, a number from a picture, which also has its index
    first = 0 if isinstance(seed, list) else wanted.get("image_index", 0)
    return Request(
        prompt=wanted["prompt"],
        negative_prompt=wanted.get("negative_prompt"),
        parameters=GenerationParameters(**settings),
        seeds=tuple(seed) if isinstance(seed, list) else (seed,),
        image_indices=range(first, first + wanted.get("num_images", 1)),
    )


# Names of flags and metadata, and the parameters they set.
_PARAMETERS = {
    "width": "width",
    "height": "height",
    "steps": "num_inference_steps",
    "cfg_scale": "cfg_scale",
    "rng": "rng",
    "sigmas": "sigmas",
    "shift": "shift",
}

# Types of the metadata that --from-image reads; other keys are for people.
_RECORDED: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "revision": str,
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "steps": int,
    "cfg_scale": (int, float),
    "seed": int,
    "image_index": int,
    "rng": str,
    "sigmas": list,
    "shift": (int, float),
    "dtype": str,
}


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that are set; raises RequestError for one of the wrong type."""
    recorded = {name: metadata[name] for name in _RECORDED if metadata.get(name) is not None}
    for name, value in recorded.items():
        if not isinstance(value, _RECORDED[name]) or isinstance(value, bool):
            raise RequestError(f"the picture's metadata is damaged: its {name} is {value!r}")
    return recorded


def _size(arguments: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, int]:
    """--width and --height, or --aspect, or the recorded size, or the default bucket."""
    if (arguments.width is None) != (arguments.height is None):
        raise RequestError("give both --width and --height, or --aspect")
    if arguments.width is not None:
        if arguments.aspect is not None:
            raise RequestError("give either --width and --height or --aspect, not both")
        return {}
    if arguments.aspect is None and {"width", "height"} <= recorded.keys():
        return {}
    width, height = ASPECT_SIZES[arguments.aspect or next(iter(ASPECT_SIZES))]
    return {"width": width, "height": height}
