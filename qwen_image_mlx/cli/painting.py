"""What `generate` and `edit` share: their flags, and the way from flags to saved pictures."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..pipeline.parameters import DTYPES, RNGS
from ..pipeline.request import build_request, parsed_size
from ..variants import ASPECT_SIZES, LORA_MODES
from .config import add_painter_config_flags, configured, wants_timings
from .words import RANDOM, draw_seed, filled, read_prompt

logger = logging.getLogger(__name__)

# Types of what only the command line knows of a picture, added to its metadata.
_PROVENANCE: dict[str, type | tuple[type, ...]] = {
    "images": list,
    "layer": str,
    "mask": str,
    "size": str,
    "mask_padding": int,
    "no_composite": bool,
    "reference_pixels": int,
    "keep_alpha": bool,
    "ignore_profile": bool,
    "zero_cond_t": str,
    "lora_mode": str,
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
    "strength": (int, float),
    "dtype": str,
    "quantize": str,
    "loras": list,
    "transformer": str,
    "text_encoder": str,
    "vae": str,
} | _PROVENANCE


_CHOICES = {"zero_cond_t": ("on", "off"), "lora_mode": LORA_MODES}


def add_flags(parser: argparse.ArgumentParser, default_model: str, steps: int) -> None:
    """Adds the flags of both commands; every default is None, so that a flag given is a flag meant."""
    add = parser.add_argument
    add_model_flags(parser, default_model)
    add_painter_flags(parser)
    add("--width", "-W", type=int, help="in pixels, a multiple of 16")
    add("--height", "-H", type=int, help="in pixels, a multiple of 16")
    add_sampling_flags(parser, steps)
    add("--output", "-o", metavar="PATH", help="PNG file or directory (default: ./qwen-image.png)")
    add("--mask", metavar="IMAGE", help="white where the picture is painted anew; the rest comes back bit by bit")
    add("--strength", type=float, metavar="S", help="how much is painted anew, above 0 and at most 1 (default: 0.6)")
    add("--size", metavar="1mp|source|WxH", help="with --image, size of the result: about 1 MP at its aspect, the same "
        "resized to its size, or an explicit one (default: 1mp; source with a mask)")  # fmt: skip
    add("--mask-padding", type=int, metavar="N", help="paint only the mask's surroundings, N pixels around it")
    add("--no-composite", action="store_true", default=None, help="with a mask, give the model's own picture")
    add_cache_flag(parser)
    add_colour_flag(parser)
    add("--from-image", metavar="IMAGE", help="paint a picture again from its own metadata; flags win")


def add_model_flags(parser: argparse._ActionsContainer, default_model: str) -> None:
    """Adds what `open_pipeline` reads."""
    add = parser.add_argument
    add("--model", "-m", help=f"a local directory or a Hugging Face id (default: {default_model})")
    add("--revision", help="branch, tag or commit of a Hugging Face model")
    add("--dtype", choices=DTYPES, help="of the text encoder and the transformer (default: bfloat16)")
    add("--quantize", metavar="Q", help="pack weights while they are loaded: 3, 4, 5, 6, 8, mxfp4, mxfp8 or nvfp4 (the "
        "transformer's; the text encoder's take 8), or transformer=4,text_encoder=8,vision=8")  # fmt: skip
    add("--group-size", type=int, metavar="G", help="columns that share a scale: 32, 64 or 128 "
        "(default: 64); the microscaling formats have their own")  # fmt: skip
    add("--text-encoder", metavar="FILE", help="a .safetensors file (or a folder) to take instead of the model's own "
        "text encoder with its vision tower, as other programs use them")  # fmt: skip


def add_painter_flags(parser: argparse._ActionsContainer) -> None:
    """Adds what else `open_pipeline` reads where a picture is painted."""
    add = parser.add_argument
    add("--lora", dest="loras", action="append", metavar="REF[@S]", help="a LoRA and its strength: a file, a folder, "
        "owner/repo, owner/repo:file or a file's address on the hub; repeat for more")  # fmt: skip
    add("--lora-mode", choices=LORA_MODES, help="merge LoRAs into the weights, or run them beside "
        "(default: auto, which merges unless the weights are packed or too coarse)")  # fmt: skip
    add("--transformer", metavar="FILE", help="a .safetensors or .gguf file (or a folder) to take instead of the "
        "model's own")  # fmt: skip
    add("--vae", metavar="FILE", help="the same for the autoencoder")
    add("--memory", metavar="M", help="keep to it: 16GB, or auto for what this machine has; weights stay loaded, take "
        "turns or are streamed from the files as it demands; or say how: resident, staged, streamed (default: "
        "staged)")  # fmt: skip
    add("--force", action="store_true", default=None, help="paint although the plan does not fit the memory")
    add("--wire", action="store_true", default=None, help="keep macOS from paging out what is in use; may help with 64 "
        "GB and more, and makes macOS panic on some machines")  # fmt: skip
    add("--preview", action="store_true", default=None, help="while it paints, keep a small picture of what it is "
        "heading for beside the output")  # fmt: skip
    add("--lightning", type=int, choices=(4, 8), help="the official LoRA of the model that paints in so many steps")
    add_painter_config_flags(parser)


def add_sampling_flags(parser: argparse._ActionsContainer, steps: int) -> None:
    """Adds how pictures are sampled, whatever they show."""
    add = parser.add_argument
    add("--negative-prompt", "-n", metavar="N", help="what to avoid (default: as the model's card says)")
    add("--steps", type=int, help=f"denoising steps (default: {steps})")
    add("--cfg-scale", "-g", type=float, metavar="S", help="guidance; 1 turns it off (default: 4.0)")
    add("--seed", "-s", type=int, nargs="+", metavar="N", help="one picture per seed; -1 is a random one (default: "
        "random)")  # fmt: skip
    add("--num-images", type=int, metavar="N", help="pictures per seed (default: 1)")
    add("--rng", choices=RNGS, help="whose noise a seed stands for: PyTorch's on the CPU, or MLX's (default: torch)")


def add_colour_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --ignore-profile, which `main` obeys for the whole command."""
    parser.add_argument("--ignore-profile", action="store_true", default=None, help="ignore the colour profiles of "
                        "images and take their numbers as sRGB, as diffusers does")  # fmt: skip


def add_cache_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --cache."""
    parser.add_argument("--cache", action="store_true", default=None, help="keep encoded prompts and pictures for next "
                        "time, at most 2 GB, in ~/.cache/qwen-image-mlx; removing that folder is safe")  # fmt: skip


def run_painting(arguments: argparse.Namespace, default_model: str, task: str) -> None:
    """Paints and saves every picture asked for; what can be wrong without the model is found before it is touched."""
    from ..images.colour import ignore_profiles
    from ..images.files import check_text, check_writable, output_path, read_metadata, save_png
    from ..images.recompose import adopt_layer, edited_layer_path
    from ..images.sources import open_image, open_mask, open_rgba

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    read_prompt(given)
    recorded, metadata = {}, {}
    if "from_image" in given:
        metadata = read_metadata(given["from_image"])
        recorded = _beside(Path(given["from_image"]).parent, _checked(metadata))
        if "model" in given:
            for name in ("revision", "transformer", "text_encoder", "vae"):
                recorded.pop(name, None)  # recorded for one model, it means nothing for another
    usual = configured(arguments, task, metadata)
    wanted = {**usual, **recorded, **given}
    wanted.setdefault("seed", [RANDOM])
    if drawn := RANDOM in (seeds := wanted["seed"] if isinstance(wanted["seed"], list) else []):
        wanted["seed"] = [draw_seed() if seed == RANDOM else seed for seed in seeds]
    sources = _sources(given, wanted)
    size = _size(given, recorded, bool(sources), usual.get("aspect"))
    if task == "edit" and not sources and metadata:
        raise RequestError(
            f"{given['from_image']} was generated from words, not edited: give --image, or `generate --from-image`"
        )
    if task == "edit" and not sources:
        raise RequestError("a picture to edit is missing: give --image")
    if task == "generate" and len(sources) > 1:
        raise RequestError(f"generate paints over one picture, but {len(sources)} are given with --image")
    for name in ("mask", "size", "strength", "mask_padding"):
        if name in given and not sources:
            raise RequestError(f"--{name.replace('_', '-')} needs --image")
    for name in ("mask_padding", "no_composite"):
        if name in given and "mask" not in wanted:
            raise RequestError(f"--{name.replace('_', '-')} needs --mask")
    if task == "edit" and "strength" in given and "mask" not in wanted:
        raise RequestError("--strength needs --mask: without one an edit begins with noise alone")
    if sources and size is not None:
        wanted["size"] = size if isinstance(size, str) else "x".join(map(str, size))
    check_text([wanted.get(name) for name in _PROVENANCE])
    draft = build_request(wanted, size if isinstance(size, tuple) else ASPECT_SIZES.get(size, (1024, 1024)))
    adopted = edited_layer_path(given["layer"]) if "layer" in given and "output" not in given else None
    if adopted and (wanted["size"] != "source" or len(draft.seeds) * len(draft.image_indices) > 1):
        raise RequestError("one picture of the layer's own size takes its place: give --output for others")
    path = adopted or output_path(filled(given.get("output"), draft.seeds[0]))
    check_writable(path, nbytes=3 * draft.parameters.width * draft.parameters.height)

    from ..runtime.asking import open_pipeline, painting_request, say_what_is_ignored, settled
    from ..runtime.cache import EncodingCache
    from ..runtime.preview import Preview
    from ..runtime.profile import Profile
    from ..runtime.session import paint
    from .console import ProgressBars, messages
    from .preview import preview_file

    with messages(), ProgressBars() as bars, ExitStack() as stack:
        profile = Profile(bars) if wants_timings(arguments) else None
        stack.enter_context(ignore_profiles(bool(wanted.get("ignore_profile"))))  # flag, or what a picture recorded
        pictures = [open_image(source) for source in sources]
        mask = open_mask(wanted["mask"]) if "mask" in wanted else None
        pipeline = open_pipeline(wanted, default_model, profile or bars)
        pipeline.check_task(task)
        straight = [open_rgba(source) for source in sources] if wanted.get("keep_alpha") else None
        request = painting_request(pipeline, wanted, size, pictures, mask, straight)
        say_what_is_ignored([(wanted, request)])
        plan = stack.enter_context(
            settled(pipeline, request, wanted.get("memory"), force="force" in given, wire="wire" in given)
        )
        provenance = {name: wanted[name] for name in _PROVENANCE if name in wanted}
        if drawn:
            logger.info("seed %s", ", ".join(map(str, request.seeds)))
        watch = profile or bars
        if "preview" in given:
            watch = Preview(stack.enter_context(preview_file(path)), watch, pipeline, request)
        cache = EncodingCache() if "cache" in given else None
        saved: Counter[Path] = Counter()
        for painting in paint(pipeline, request, watch, cache, plan.residency):
            bars.close()
            if profile:
                painting.metadata["profile"] = profile.record()
            file = adopted or output_path(filled(given.get("output"), painting.metadata["seed"]))
            number = saved[file]
            saved[file] += 1
            file = file.with_stem(f"{file.stem}-{number}") if number else file
            written = save_png(painting.image, file, {**painting.metadata, **provenance})
            if adopted:
                adopt_layer(given["layer"], written)
            print(written, flush=True)
        if len(request.image_indices) > 1:
            logger.info("each of these images can be generated again by itself: --from-image FILE")
        if profile:
            logger.info("%s", profile.table())


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that are set; raises RequestError for one of the wrong type."""
    recorded = {name: metadata[name] for name in _RECORDED if metadata.get(name) is not None}
    for name, value in recorded.items():
        fits = isinstance(value, _RECORDED[name]) and isinstance(value, bool) == (_RECORDED[name] is bool)
        if isinstance(value, list):
            fits = fits and all(isinstance(item, (int, float) if name == "sigmas" else str) for item in value)
        if not fits or value not in _CHOICES.get(name, (value,)):
            raise RequestError(f"the picture's metadata is damaged: its {name} is {value!r:.80}")
    return recorded


def _beside(folder: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """Looks for what a picture was made from beside it, where it is not at its recorded place."""

    def find(place: str) -> str:
        beside = folder / place
        return str(beside) if beside.exists() and not Path(place).exists() else place

    places = ("model", "mask", "transformer", "text_encoder", "vae")
    found = {name: find(recorded[name]) for name in places if name in recorded}
    if "images" in recorded:
        found["images"] = [find(image) for image in recorded["images"]]
    if "loras" in recorded:
        parts = [reference.rpartition("@") for reference in recorded["loras"]]
        found["loras"] = [f"{find(place)}@{strength}" for place, _, strength in parts]
    if "layer" in recorded:
        place, _, number = recorded["layer"].rpartition(":")
        found["layer"] = f"{find(place)}:{number}"
    return recorded | found


def _sources(given: Mapping[str, Any], wanted: dict[str, Any]) -> list[Any]:
    """The pictures to work on; a layer brings what keeps it in its place, its size and its transparency."""
    if "layer" not in given and ("layer" not in wanted or "images" in given):
        wanted.pop("layer", None)
        return wanted.get("images", [])
    if "images" in given:
        raise RequestError("give --image or --layer, not both")
    from ..images.colour import ignore_profiles
    from ..images.recompose import layer_file, open_layer

    wanted.pop("images", None)
    wanted["keep_alpha"] = True
    with ignore_profiles(bool(wanted.get("ignore_profile"))):
        image, file = open_layer(wanted["layer"]).image, layer_file(wanted["layer"])
    if file is not None:  # recorded as itself: the layer of that number may be another one tomorrow
        del wanted["layer"]
        wanted["images"] = [str(file)]
    return [image]


def _size(
    given: Mapping[str, Any], recorded: Mapping[str, Any], painted_over: bool, aspect: str | None
) -> tuple[int, int] | str | None:
    """(width, height), "1mp", "source", an aspect, or None for what is usual: of flags, picture or config."""
    if ("width" in given) != ("height" in given):
        raise RequestError("give both --width and --height, or --aspect")
    explicit = []
    if "width" in given:
        explicit.append((given["width"], given["height"]))
    if "aspect" in given:
        explicit.append(given["aspect"])
    if "size" in given:
        explicit.append(parsed_size(given["size"], "--size"))
    if len(explicit) > 1:
        raise RequestError("give one size only: --width and --height, or --aspect, or --size")
    if explicit:
        return explicit[0]
    if "size" in recorded:
        return parsed_size(recorded["size"])
    if "layer" in given:
        return "source"
    if {"width", "height"} <= recorded.keys() and not painted_over:
        return recorded["width"], recorded["height"]
    return None if painted_over else aspect or next(iter(ASPECT_SIZES))
