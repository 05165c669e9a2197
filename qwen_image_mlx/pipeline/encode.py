"""The encoding half of the core calls: prompts and images to a guidance encoding, an image to the initial latents.

Functions over a checkpoint's components; each evaluates what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import RequestError
from ..gpu import finish
from ..images.geometry import Size, size_of_area
from ..images.pixels import to_mask, to_pixels
from ..images.sources import ImageSource, as_list, check_visible, open_image, open_mask, open_rgba
from ..names import CaptionLanguage
from ..registry import VAE, VAE_ENCODER
from ..variants import CAPTION_TEMPLATES
from .autoencode import encode_mode, encode_moments
from .components import Components
from .conditioning import EncodingSource, GuidanceEncoding, InitialImage, Reference
from .parameters import check_reference_pixels, check_seed, check_side, check_size
from .progress import ProgressCallback
from .reporter import Reporter
from .seams import ConditionEncoder
from .working import working


def encode_guidance_prompts(
    components: Components,
    encoder: ConditionEncoder,
    report: Reporter,
    prompt: str,
    negative_prompt: str | None,
    images: Sequence[ImageSource],
    reference_pixels: int | None,
    sequential_positions: bool,
    progress: ProgressCallback | None,
) -> GuidanceEncoding:
    """The work of `QwenImagePipeline.encode_guidance_prompts`: its arguments and errors, and its encoder."""
    check_reference_pixels(reference_pixels)
    opened = open_images(components, images)
    shown = opened if components.variant.encoder_area else []
    references: tuple[Reference, ...] = ()
    with working(components, report, progress):
        prompts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        states, starts = encoder.encode(prompts, shown, report, sequential_positions, reference_pixels)
        if opened:
            components.load(VAE_ENCODER)
            with report.stage("encode", "references"):
                references = _references(components, opened, reference_pixels, starts)
    snapshot = components.snapshot
    return GuidanceEncoding(
        states[0],
        states[1] if negative_prompt is not None else None,
        references,
        EncodingSource(snapshot.model, snapshot.revision, prompt, negative_prompt),
    )


def encode_initial_image(
    components: Components,
    report: Reporter,
    image: ImageSource,
    size: Size,
    mask: ImageSource | None,
    progress: ProgressCallback | None,
) -> InitialImage:
    """The work of `QwenImagePipeline.encode_initial_image`; its arguments and errors."""
    check_size(*size, components.latent_space.size_multiple)
    opened, opened_mask = open_for(components, image), None if mask is None else open_mask(mask)
    with working(components, report, progress):
        components.load(VAE_ENCODER)
        with report.stage("encode", "image"):
            return _initial_image(components, opened, size, opened_mask)


def caption_image(
    components: Components,
    encoder: ConditionEncoder,
    report: Reporter,
    image: ImageSource,
    language: CaptionLanguage,
    resolution: int,
    seed: int,
    progress: ProgressCallback | None,
) -> str:
    """The work of `QwenImagePipeline.caption_image`: its arguments and errors, and its encoder."""
    check_side(resolution)
    if not isinstance(language, str) or language not in CAPTION_TEMPLATES:
        raise RequestError(f"language is {language!r}, but must be one of {', '.join(CAPTION_TEMPLATES)}")
    opened = open_rgba(image)
    check_visible(opened)
    with working(components, report, progress):
        return encoder.caption(opened, resolution**2, language, check_seed(seed), report)


def open_images(components: Components, images: Sequence[ImageSource]) -> list[Image.Image]:
    """The images that a model works on, upright; raises RequestError if it does not take this number of images."""
    images, variant, model = as_list(images), components.variant, components.snapshot.model
    if variant.needs_images and not images:
        raise RequestError(f"{model} works on images; give it at least one")
    if images and not variant.takes_images:
        raise RequestError(f"{model} generates from text; only an editing model takes images to work on")
    if variant.max_images is not None and len(images) > variant.max_images:
        limit = "1 image" if variant.max_images == 1 else f"at most {variant.max_images} images"
        raise RequestError(f"{model} works on {limit} at a time, but {len(images)} are given")
    return [open_for(components, image) for image in images]


def open_for(components: Components, image: ImageSource) -> Image.Image:
    """An image, upright, with the channels that a model's autoencoder has."""
    return (open_rgba if components.latent_space.pixel_channels == 4 else open_image)(image)


def _references(
    components: Components, images: Sequence[Image.Image], max_pixels: int | None, starts: Sequence[int]
) -> tuple[Reference, ...]:
    """The reference latents of each image, resized to the pipeline's area (at most `max_pixels`) at its own aspect.

    `starts` are those of `Encoded`.
    """
    area, space = components.variant.reference_area, components.latent_space
    area = area if max_pixels is None else min(area, max_pixels)
    references = []
    for number, image in enumerate(images):
        size = size_of_area(area, image.size)
        latents = encode_mode(components.network(VAE_ENCODER), components.config(VAE), to_pixels(image, size))
        start = starts[number] if starts else None
        references.append(Reference(space.pack(latents), *space.grid(*size), start))
        finish(references[-1].latents)
    return tuple(references)


def _initial_image(components: Components, image: Image.Image, size: Size, mask: Image.Image | None) -> InitialImage:
    """Latent statistics of an image resized to `size`, and its mask by nearest latent."""
    mean, std = encode_moments(components.network(VAE_ENCODER), components.config(VAE), to_pixels(image, size))
    if mask is None:
        return InitialImage(mean, std)
    factor = components.latent_space.factor
    latent_mask = mx.array(np.ascontiguousarray(to_mask(mask, size)[::factor, ::factor])[None, :, :, None])
    finish(latent_mask)
    return InitialImage(mean, std, latent_mask)
