"""What `generate` and `edit` share: the way from flags to saved pictures."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..pipeline.request import build_request, parsed_size
from ..runtime.options import recorded
from ..variants import ASPECT_SIZES
from .config import configured
from .flags import flag_of, rows_of
from .idle import say_idle
from .output import output_path
from .replay import replayed
from .words import RANDOM, draw_seed, filled, read_prompt

logger: logging.Logger = logging.getLogger(__name__)

# What only a front end knows of a picture, added to its metadata.
_PROVENANCE = [row.name for row in recorded("asked")]


def run_painting(arguments: argparse.Namespace, default_model: str, task: str, command: str | None = None) -> None:
    """Paints and saves every picture asked for; what can be wrong without the model is found before it is touched.

    Args:
        arguments: the flags.
        default_model: where neither they nor the config name one.
        task: what the model must be made for.
        command: whose flags these are; None is that of the task's name.
    """
    from ..files import check_writable
    from ..images.colour import ignore_profiles
    from ..images.files import OPAQUE, check_text, read_metadata, save_image
    from ..images.sources import open_image, open_mask, open_rgba

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    read_prompt(given)
    metadata = read_metadata(given["from_image"]) if "from_image" in given else {}
    said = replayed(given["from_image"], metadata, given) if metadata else {}
    usual = configured(arguments, task, metadata)
    wanted = {**usual, **said, **given}
    wanted.setdefault("seed", [RANDOM])
    if drawn := RANDOM in (seeds := wanted["seed"] if isinstance(wanted["seed"], list) else []):
        wanted["seed"] = [draw_seed() if seed == RANDOM else seed for seed in seeds]
    sources = _sources(given, wanted)
    size = _size(given, said, bool(sources), usual.get("aspect"))
    if task == "edit" and not sources and metadata:
        raise RequestError(
            f"{given['from_image']} was generated from words, not edited: give --image, or `generate --from-image`"
        )
    if task == "edit" and not sources:
        raise RequestError("a picture to edit is missing: give --image")
    if task == "generate" and len(sources) > 1:
        raise RequestError(f"generate paints over one picture, but {len(sources)} are given with --image")
    _check_needs(given, wanted, task, bool(sources))
    if sources and size is not None:
        wanted["size"] = size if isinstance(size, str) else "x".join(map(str, size))
    check_text([wanted.get(name) for name in _PROVENANCE])
    draft = build_request(wanted, size if isinstance(size, tuple) else ASPECT_SIZES.get(size, (1024, 1024)))
    adopted = None
    if "layer" in given and "output" not in given:
        from ..layers.recompose import adopt_layer, edited_layer_path

        adopted = edited_layer_path(given["layer"])
    if adopted and (wanted["size"] != "source" or len(draft.seeds) * len(draft.image_indices) > 1):
        raise RequestError("one picture of the layer's own size takes its place: give --output for others")
    path = adopted or output_path(filled(given.get("output"), seed=draft.seeds[0], index=1, prompt=draft.prompt))
    if path.suffix.lower() in OPAQUE and wanted.get("keep_alpha"):
        raise RequestError(f"--output is {path}, but JPEG has no transparency to keep; end the name in .png or .webp")
    check_writable(path, nbytes=3 * draft.parameters.width * draft.parameters.height)

    from ..runtime.session import Session
    from .console import Console

    with Console(arguments) as console, ExitStack() as stack:
        timings = console.timings("timings" in given)
        stack.enter_context(ignore_profiles(bool(wanted.get("ignore_profile"))))  # flag, or what a picture recorded
        pictures = [open_image(source) for source in sources]
        mask = open_mask(wanted["mask"]) if "mask" in wanted else None
        session = Session.open(wanted, default_model, timings or console, task=task)
        straight = [open_rgba(source) for source in sources] if wanted.get("keep_alpha") else None
        request = session.request(wanted, size, pictures, mask, straight)
        say_idle(command or task, given, request)
        provenance = {name: wanted[name] for name in _PROVENANCE if name in wanted}
        if drawn:
            logger.info("seed %s", ", ".join(map(str, request.seeds)))
        show = None
        if "preview" in given:
            from .preview import preview_file

            show = stack.enter_context(preview_file(path))
        saved: Counter[Path] = Counter()
        for index, painting in enumerate(session.paint(request, show), 1):
            if "timings" in given:
                painting.metadata["profile"] = timings.record()
            file = adopted or output_path(
                filled(given.get("output"), seed=painting.metadata["seed"], index=index, prompt=request.prompt)
            )
            number = saved[file]
            saved[file] += 1
            file = file.with_stem(f"{file.stem}-{number}") if number else file
            written = save_image(painting.image, file, {**painting.metadata, **provenance})
            if adopted:
                adopt_layer(given["layer"], written)
            seed, number = painting.metadata["seed"], painting.metadata["image_index"]
            console.result(written, seed=seed, index=number, metadata=painting.metadata | provenance)
        if len(request.image_indices) > 1:
            logger.info("each of these images can be generated again by itself: --from-image FILE")
        if timings:
            console.close()
            logger.info("%s", timings.table())


def _check_needs(given: Mapping[str, Any], wanted: Mapping[str, Any], task: str, has_pictures: bool) -> None:
    """Raises RequestError for a flag without which what it is about is missing: a picture, a mask."""
    missing = {"images"} if not has_pictures else set()
    missing |= {"mask"} - wanted.keys()
    for need, why in (("images", ""), ("mask", ": without one an edit begins with noise alone")):
        for row in rows_of(task):
            if row.name in given and need in row.needs and need in missing:
                reason = why if row.name == "strength" else ""
                raise RequestError(f"{row.flag} needs {flag_of(need)}{reason}")


def _sources(given: Mapping[str, Any], wanted: dict[str, Any]) -> list[Any]:
    """The pictures to work on; a layer brings what keeps it in its place, its size and its transparency."""
    if "layer" not in given and ("layer" not in wanted or "images" in given):
        wanted.pop("layer", None)
        return wanted.get("images", [])
    if "images" in given:
        raise RequestError("give --image or --layer, not both")
    from ..images.colour import ignore_profiles
    from ..layers.recompose import layer_file, open_layer

    wanted.pop("images", None)
    wanted["keep_alpha"] = True
    with ignore_profiles(bool(wanted.get("ignore_profile"))):
        image, file = open_layer(wanted["layer"]).image, layer_file(wanted["layer"])
    if file is not None:  # said as itself: the layer of that number may be another one tomorrow
        del wanted["layer"]
        wanted["images"] = [str(file)]
    return [image]


def _size(
    given: Mapping[str, Any], said: Mapping[str, Any], painted_over: bool, aspect: str | None
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
    if "size" in said:
        return parsed_size(said["size"])
    if "layer" in given:
        return "source"
    if {"width", "height"} <= said.keys() and not painted_over:
        return said["width"], said["height"]
    return None if painted_over else aspect or next(iter(ASPECT_SIZES))
