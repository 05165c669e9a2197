"""The options of `generate` and `edit` in force: flags override an image's record, which overrides config.toml.

All of them are checked without the model."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..pipeline.request import Request, build_request, parse_size
from ..runtime.options import recorded
from ..variants import ASPECT_SIZES
from .config import config_options
from .flags import flag_of, rows_of
from .output import check_output, output_path
from .replay import replay_options
from .words import RANDOM, draw_seed, fill_placeholders, read_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

# Metadata of an image that only a front end knows.
_PROVENANCE = [row.name for row in recorded("given")]


@dataclass(frozen=True)
class Choices:
    """The options of one command, and where its images go.

    Attributes:
        given: the flags alone.
        options: all options that are set, keyed by their names in the table.
        size: (width, height), "1mp", "source", an aspect, or None for the default.
        sources: the images to work on, or their names.
        draft: the request, as far as it is known without the model.
        drawn: whether a seed was drawn at random.
        layer: the layer's file that takes the result in its place; None is an ordinary output.
    """

    given: Mapping[str, Any]
    options: Mapping[str, Any]
    size: tuple[int, int] | str | None
    sources: list[Any]
    draft: Request
    drawn: bool
    layer: Path | None
    _saved: Counter[Path] = field(default_factory=Counter)

    @property
    def provenance(self) -> dict[str, Any]:
        """What is recorded of the options in addition to what the pipeline records."""
        return {name: self.options[name] for name in _PROVENANCE if name in self.options}

    @property
    def first_path(self) -> Path:
        """Where the first image goes."""
        return self._path(self.draft.seeds[0], 1)

    def path(self, seed: int, index: int) -> Path:
        """The path of an image; no two images of a run have the same.

        Args:
            seed: the image's.
            index: its number, from 1.
        """
        path = self._path(seed, index)
        number = self._saved[path]
        self._saved[path] += 1
        return path.with_stem(f"{path.stem}-{number}") if number else path

    def _path(self, seed: int, index: int) -> Path:
        named = fill_placeholders(self.given.get("output"), seed=seed, index=index, prompt=self.draft.prompt)
        return self.layer or output_path(named)

    def open_images(self, alpha: bool = False) -> tuple[list[Image], Image | None, list[Image] | None]:
        """The images to work on (RGB, or with `alpha` RGBA), the mask, and with keep_alpha the same images as RGBA.

        Raises:
            RequestError: one cannot be read.
        """
        from ..images.sources import open_image, open_mask, open_rgba

        images = [(open_rgba if alpha else open_image)(source) for source in self.sources]
        mask = open_mask(self.options["mask"]) if "mask" in self.options else None
        straight = [open_rgba(source) for source in self.sources] if self.options.get("keep_alpha") else None
        return images, mask, straight


def choose(arguments: argparse.Namespace, task: str) -> Choices:
    """The options in force. Every fault that can be found without the model is found here.

    Args:
        arguments: the flags.
        task: "generate" or "edit".

    Raises:
        RequestError: options contradict each other, are out of range, or an image cannot be read.
        OutputError: the output cannot be written.
    """
    from ..images.files import check_text, read_metadata
    from ..images.sheet import RECORDS, pick_record

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    read_prompt(given)
    metadata: dict[str, Any] = {}
    if "from_image" in given:
        metadata = read_metadata(given["from_image"])
        if task == "edit" and RECORDS in metadata:
            raise RequestError(
                f"{given['from_image']} is a contact sheet, whose images were generated from text: use generate"
            )
        metadata = pick_record(metadata, given.get("pick"), given["from_image"])
    _check_many(given)
    record = replay_options(given["from_image"], metadata, given) if metadata else {}
    config = config_options(arguments, task, metadata)
    options = {"seed": [RANDOM], **config, **record, **given}
    if drawn := RANDOM in (seeds := options["seed"] if isinstance(options["seed"], list) else []):
        options["seed"] = [draw_seed() if seed == RANDOM else seed for seed in seeds]
    sources = _sources(given, options)
    size = _size(given, record, bool(sources), config.get("aspect"))
    _check_sources(given, sources, task, bool(metadata))
    _check_needs(given, options, task, bool(sources))
    if sources and size is not None:
        options["size"] = size if isinstance(size, str) else "x".join(map(str, size))
    check_text([options.get(name) for name in _PROVENANCE])
    draft = build_request(options, size if isinstance(size, tuple) else ASPECT_SIZES.get(size, (1024, 1024)))
    chosen = Choices(given, options, size, sources, draft, drawn, _layer(given, options, draft))
    _check_output(chosen)
    return chosen


def _check_many(given: Mapping[str, Any]) -> None:
    """Raises RequestError for flags that mean something for a contact sheet alone."""
    if "pick" in given and "from_image" not in given:
        raise RequestError("--pick needs --from-image with a contact sheet")
    if "contact_sheet" in given:
        raise RequestError("--contact-sheet shows many images: give --seeds or --prompts-file with it")


def _layer(given: Mapping[str, Any], options: Mapping[str, Any], draft: Request) -> Path | None:
    """The new file of the layer that takes the result in its place; None without one."""
    if "layer" not in given or "output" in given:
        return None
    from ..layers.recompose import edited_layer_path

    path = edited_layer_path(given["layer"])
    if path and (options["size"] != "source" or len(draft.seeds) * len(draft.image_indices) > 1):
        raise RequestError("one image of the layer's own size takes its place: give --output for others")
    return path


def _check_output(chosen: Choices) -> None:
    """Raises RequestError or OutputError where the first image could not be written."""
    from ..images.files import OPAQUE

    path, parameters = chosen.first_path, chosen.draft.parameters
    if path.suffix.lower() in OPAQUE and chosen.options.get("keep_alpha"):
        raise RequestError(f"--output is {path}, but JPEG has no transparency to keep; end the name in .png or .webp")
    check_output(path, nbytes=3 * parameters.width * parameters.height)


def _check_sources(given: Mapping[str, Any], sources: list[Any], task: str, replays: bool) -> None:
    """Raises RequestError for too few or too many images to work on."""
    if task == "edit" and not sources and replays:
        raise RequestError(
            f"{given['from_image']} was generated from text, not edited: give --image, or `generate --from-image`"
        )
    if task == "edit" and not sources:
        raise RequestError("an image to edit is missing: give --image")
    if task == "generate" and len(sources) > 1:
        raise RequestError(f"generate starts from one image, but {len(sources)} are given with --image")


def _check_needs(given: Mapping[str, Any], options: Mapping[str, Any], task: str, has_images: bool) -> None:
    """Raises RequestError for a flag whose image or mask is missing."""
    missing = {"images"} if not has_images else set()
    missing |= set() if {"mask", "outpaint"} & options.keys() else {"mask"}
    for need, why in (("images", ""), ("mask", ": without one an edit begins with noise alone")):
        for row in rows_of(task):
            if row.name in given and need in row.needs and need in missing:
                reason = why if row.name == "strength" else ""
                raise RequestError(f"{row.flag} needs {flag_of(need)}{reason}")


def _sources(given: Mapping[str, Any], options: dict[str, Any]) -> list[Any]:
    """The images to work on; a layer brings what keeps it in its place, its size and its transparency."""
    if "layer" not in given and ("layer" not in options or "images" in given):
        options.pop("layer", None)
        return options.get("images", [])
    if "images" in given:
        raise RequestError("give --image or --layer, not both")
    if "outpaint" in options and "output" not in given:
        raise RequestError("outpainted, a layer would no longer fit in its place: give --output")
    from ..images.colour import ignore_profiles
    from ..layers.recompose import layer_file, open_layer

    options.pop("images", None)
    options["keep_alpha"] = True
    with ignore_profiles(bool(options.get("ignore_profile"))):
        image, file = open_layer(options["layer"]).image, layer_file(options["layer"])
    if file is not None:  # recorded as a file: the layer of that number may be a different one tomorrow
        del options["layer"]
        options["images"] = [str(file)]
    return [image]


def _size(
    given: Mapping[str, Any], record: Mapping[str, Any], from_image_input: bool, aspect: str | None
) -> tuple[int, int] | str | None:
    """(width, height), "1mp", "source", an aspect, or None for the default; from flags, record or config."""
    if ("width" in given) != ("height" in given):
        raise RequestError("give both --width and --height, or --aspect")
    explicit = []
    if "width" in given:
        explicit.append((given["width"], given["height"]))
    if "aspect" in given:
        explicit.append(given["aspect"])
    if "size" in given:
        explicit.append(parse_size(given["size"], "--size"))
    if len(explicit) > 1:
        raise RequestError("give one size only: --width and --height, or --aspect, or --size")
    if explicit:
        return explicit[0]
    if "size" in record:
        return parse_size(record["size"])
    if "layer" in given:
        return "source"
    if {"width", "height"} <= record.keys() and not from_image_input:
        return record["width"], record["height"]
    return None if from_image_input else aspect or next(iter(ASPECT_SIZES))
