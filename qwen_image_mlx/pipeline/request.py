"""What a user asks for: prompts, pictures, parameters, seeds; validated once, importable without MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RequestError
from .parameters import MAX_IMAGES, GenerationParameters, check_reference_pixels, check_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.canvas import Canvas


@dataclass(frozen=True, kw_only=True)
class Request:
    """One or more pictures of one prompt.

    Attributes:
        prompt: what to paint.
        negative_prompt: what to avoid; None paints without guidance.
        parameters: how to paint.
        seeds: at least one.
        image_indices: for each seed, which of its pictures (the reference's num_images_per_prompt counts from 0).
        images: upright RGB pictures for an editing model to work on.
        canvas: the picture that is painted over, or whose size the result takes.
        reference_pixels: at most so many pixels of each of `images` are shown to the transformer.
        caption_language: of the caption that a layered model writes where the prompt is empty; a key of
            `CAPTION_TEMPLATES`.
    """

    prompt: str
    negative_prompt: str | None
    parameters: GenerationParameters
    seeds: tuple[int, ...]
    image_indices: range = range(1)
    images: tuple[Image, ...] = ()
    canvas: Canvas | None = None
    reference_pixels: int | None = None
    caption_language: str | None = None

    def __post_init__(self) -> None:
        check_reference_pixels(self.reference_pixels)
        for seed in self.seeds:
            check_seed(seed)
        indices = self.image_indices
        if not indices or indices[0] < 0 or indices[-1] >= MAX_IMAGES or len(indices) * len(self.seeds) > MAX_IMAGES:
            raise RequestError(f"the number of pictures must be from 1 to {MAX_IMAGES}")
