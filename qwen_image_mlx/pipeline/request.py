"""A user's request: prompts, images, parameters, seeds; validated once, importable without MLX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..names import CaptionLanguage, PresetName
from ..outside import MAX_CHARACTERS
from ..sampling.choices import skipped_steps
from ..variants import ASPECT_SIZES, NAMED_SIZES, Variant
from .control import Control, controls_of
from .parameters import MAX_IMAGES, GenerationParameters, check_reference_pixels, check_seed, check_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.canvas import Canvas

_SLUG = 36


@dataclass(frozen=True, kw_only=True)
class Request:
    """One or more images of one prompt.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to avoid; None generates without guidance.
        parameters: how to generate.
        seeds: at least one.
        image_indices: for each seed, the index of its image, from 0 (as with the reference's num_images_per_prompt).
        images: upright RGB images for an editing model to work on.
        layer_mask: RGBA, of the image's size: what of it a layer shows.
        canvas: the image that generation starts from, or that gives the result its size.
        reference_pixels: maximum pixels of each of `images` that the transformer sees.
        controls: what steers the images by other images.
        caption_language: the language of the caption that a layered model writes if the prompt is empty; a key of
            `CAPTION_TEMPLATES`.
        preset: the preset that was chosen, for the record.
    """

    prompt: str
    negative_prompt: str | None
    parameters: GenerationParameters
    seeds: tuple[int, ...]
    image_indices: range = range(1)
    images: tuple[Image, ...] = ()
    layer_mask: Image | None = None
    canvas: Canvas | None = None
    reference_pixels: int | None = None
    controls: tuple[Control, ...] = ()
    caption_language: CaptionLanguage | None = None
    preset: PresetName | None = None

    @property
    def guiding_prompt(self) -> str | None:
        """The negative prompt if it has an effect; None if one pass is enough."""
        return self.negative_prompt if self.parameters.cfg_scale > 1 else None

    def writes_caption(self, variant: Variant) -> bool:
        """Whether the model captions the image."""
        return variant.captions and not self.prompt.strip() and not self.parameters.single_layer

    @property
    def shown(self) -> tuple[Image, ...]:
        """The images that the model sees as references, in the order of its sequence: a layer's mask comes first."""
        return self.images if self.layer_mask is None else (self.layer_mask, *self.images)

    @property
    def steering(self) -> tuple[Control, ...]:
        """The controls; one without an image is given what is inpainted, and its mask."""
        if self.canvas is None or self.canvas.mask is None:
            return self.controls
        image, mask = self.canvas.initial
        return tuple(replace(one, image=image, mask=mask) if one.image is None else one for one in self.controls)

    @property
    def starts_from_canvas(self) -> bool:
        """Whether generation starts from the canvas; an edit without a mask starts from noise alone."""
        return self.canvas is not None and (self.canvas.mask is not None or not self.images)

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        parameters = self.parameters
        left_out = skipped_steps(parameters.num_inference_steps, parameters.strength) if self.starts_from_canvas else 0
        return parameters.num_inference_steps - left_out

    def __post_init__(self) -> None:
        for prompt in (self.prompt, self.negative_prompt or ""):
            if len(prompt) > MAX_CHARACTERS:
                raise RequestError(f"a prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are read")
        check_reference_pixels(self.reference_pixels)
        for seed in self.seeds:
            check_seed(seed)
        indices = self.image_indices
        if not indices or indices[0] < 0 or indices[-1] >= MAX_IMAGES or len(indices) * len(self.seeds) > MAX_IMAGES:
            raise RequestError(f"there are {len(self.seeds):,} images, but the number must be from 1 to {MAX_IMAGES:,}")


def build_request(options: Mapping[str, Any], size: tuple[int, int]) -> Request:
    """Makes a request from flags, a record and the model's recommendations.

    Args:
        options: options, keyed by name; a seed may be a number or a list of numbers.
        size: (width, height) of the image.

    Raises:
        RequestError: the prompt is missing, or an option is out of range.
    """
    if options.get("prompt") is None:
        raise RequestError("a prompt is missing", cause="prompt")
    seed = options["seed"]  # a list from the flags, a number from an image, which also has its index
    first = 0 if isinstance(seed, list) else options.get("image_index", 0)
    return Request(
        prompt=options["prompt"],
        negative_prompt=options.get("negative_prompt"),
        parameters=GenerationParameters.from_options(options, width=size[0], height=size[1]),
        seeds=tuple(seed) if isinstance(seed, list) else (seed,),
        image_indices=range(first, first + options.get("num_images", 1)),
        controls=controls_of(options.get("controls")),
    )


def slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file's name: at most 36 characters, each up to four bytes."""
    return re.sub(r"\W+", "-", prompt.lower())[:_SLUG].strip("-") or "image"


def parse_size(text: str, name: str = "size") -> tuple[int, int] | str:
    """(width, height) of WIDTHxHEIGHT, or one of the names of sizes; raises RequestError, which calls it `name`."""
    if text.lower() in (*NAMED_SIZES, *ASPECT_SIZES):
        return text.lower()
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.lower(), re.ASCII)
    if not match:
        raise RequestError(f"{name} is {text!r:.80}, but must be 1mp, source or WIDTHxHEIGHT")
    size = int(match[1]), int(match[2])
    check_size(*size)
    return size
