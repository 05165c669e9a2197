"""A request worked through, in one order for everybody: fetch and check, encode, release, denoise, decode.

Which networks go in between is the caller's choice: `QwenImagePipeline` and `runtime/session.py` both call here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ..images.layers import Layer, LayerStack
from ..images.pixels import to_images
from ..registry import TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE_DECODER, VAE_ENCODER, VISION
from .conditioning import Encodings, GuidanceEncoding, InitialImage
from .decomposition import LayeredResult
from .metadata import describe
from .parameters import check_size
from .progress import ProgressCallback
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipeline import QwenImagePipeline

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painting:
    """A finished image, and how the pipeline made it."""

    image: Image
    metadata: dict[str, Any]


def paint(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
    *,
    release_encoders: bool = False,
    release_transformer: bool = False,
) -> Iterator[Painting]:
    """Yields the request's images one by one.

    Args:
        pipeline: the opened checkpoint.
        request: what to generate.
        progress: told of every stage and step, and can cancel.
        cache: encodings of earlier runs; with a hit no encoder is loaded.
        release_encoders: before the first image is begun.
        release_transformer: before the last image is decoded.
    """
    if not request.prompt.strip():
        logger.warning("the prompt is empty: the model paints whatever it likes")
    if len(request.images) > 2:
        logger.warning(
            "%d pictures are shown to the model, each as costly in every step as a target of its size; fewer reference "
            "pixels make them cheaper",
            len(request.images),
        )
    encoding = encoded(pipeline, request, progress, cache)
    initial = encode_canvas(pipeline, request, progress)
    if release_encoders:
        pipeline.release_encoders()
    for image, seed, index in paint_encoded(pipeline, request, encoding, initial, progress, release_transformer):
        yield Painting(image, describe(pipeline, request, encoding, seed, index))


def decompose(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
    *,
    release_encoders: bool = False,
    release_transformer: bool = False,
) -> LayeredResult:
    """Decomposes an image, each layer decoded, resized and turned into 8 bits before the next; arguments as `paint`."""
    encoding = encoded(pipeline, request, progress, cache)
    if release_encoders:
        pipeline.release_encoders()
    images = [image for image, _, _ in paint_encoded(pipeline, request, encoding, None, progress, release_transformer)]
    layers = (Layer(image, f"layer {n}") for n, image in enumerate(images))
    canvas = request.canvas
    assert canvas is not None
    metadata = describe(pipeline, request, encoding, request.seeds[0])
    return LayeredResult(canvas.resized_source, LayerStack(canvas.result_size, tuple(layers), metadata))


def encoded(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
) -> GuidanceEncoding:
    """A request's prompts and images, encoded now or by an earlier run; all files are fetched and checked before.

    Args:
        pipeline: the opened checkpoint.
        request: what is to be generated.
        progress: told of every stage, and can cancel.
        cache: of earlier runs; what is encoded now is put there.

    Raises:
        RequestError: the model generates no image of that size.
    """
    parameters = request.parameters
    check_size(parameters.width, parameters.height, pipeline.variant.size_multiple)
    pipeline.prepare()
    encoding = cache.get(pipeline, request) if cache else None
    if encoding is None:
        encoding = encode_request(pipeline, request, progress)
        if cache:
            cache.put(pipeline, request, encoding)
    return encoding


def encode_request(
    pipeline: QwenImagePipeline, request: Request, progress: ProgressCallback | None = None
) -> GuidanceEncoding:
    """`encode_guidance_prompts` for a request; the negative prompt is left out where it would change nothing.

    Where a layered model is given no prompt it captions the image, always with the same draws: a seed stands for the
    noise alone.
    """
    prompt = request.prompt
    if request.writes_caption(pipeline.variant):
        assert request.caption_language is not None
        assert request.reference_pixels is not None
        prompt = pipeline.caption_image(
            request.images[0], language=request.caption_language, resolution=math.isqrt(request.reference_pixels),
            progress=progress,
        )  # fmt: skip
        logger.info("caption: %s", prompt)
    return pipeline.encode_guidance_prompts(
        prompt,
        request.guiding_prompt,
        images=request.images,
        reference_pixels=request.reference_pixels,
        progress=progress,
    )


def encode_canvas(
    pipeline: QwenImagePipeline, request: Request, progress: ProgressCallback | None = None
) -> InitialImage | None:
    """`encode_initial_image` for a request; None where generation begins with noise alone."""
    if not request.starts_from_canvas(pipeline.variant):
        return None
    canvas = request.canvas
    assert canvas is not None
    image, mask = canvas.initial
    if not math.isclose(image.width / image.height, canvas.size[0] / canvas.size[1], rel_tol=0.05):
        logger.warning("a picture of %dx%d pixels is stretched to %dx%d to be painted over", *image.size, *canvas.size)
    return pipeline.encode_initial_image(image, canvas.size, mask, progress=progress)


def paint_encoded(
    pipeline: QwenImagePipeline,
    request: Request,
    encoding: GuidanceEncoding,
    initial: InitialImage | None,
    progress: ProgressCallback | None = None,
    release_transformer: bool = False,
) -> Iterator[tuple[Image, int, int]]:
    """Yields a request's images, (image, seed, index) each; may drop the transformer before the last is decoded."""
    draws = list(product(request.seeds, request.image_indices))
    for seed, index in draws:
        latents = pipeline.denoise_latents(
            request.parameters, encoding, seed=seed, image_index=index, initial=initial, progress=progress
        )
        if release_transformer and (seed, index) == draws[-1]:
            pipeline.release_transformer()
        for frame in pipeline.decode_frames(request.parameters, latents, progress=progress):
            (image,) = to_images(frame[None])
            yield request.canvas.finish(image) if request.canvas else image, seed, index


@contextmanager
def keeping(pipeline: QwenImagePipeline, streamed: Collection[str], strip_pixels: int) -> Iterator[None]:
    """Meanwhile reads the layers of these components from their files, and decodes at most so many pixels at once.

    What was loaded otherwise is released, before and afterwards.
    """
    before = pipeline.components.streamed, pipeline.strip_pixels
    pipeline.components.stream(streamed)
    pipeline.strip_pixels = strip_pixels
    try:
        yield
    finally:
        pipeline.components.stream(before[0])
        pipeline.strip_pixels = before[1]


def load(pipeline: QwenImagePipeline, request: Request) -> None:
    """Loads now what a request needs, unless it is loaded."""
    components = pipeline.components
    components.load(TOKENIZER, TEXT_ENCODER, TRANSFORMER, VAE_DECODER)
    if request.images:
        components.load(VAE_ENCODER)
    if request.images and pipeline.variant.encoder_area:
        components.load(VISION)
