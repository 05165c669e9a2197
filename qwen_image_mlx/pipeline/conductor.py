"""Runs a request in the one order that all front ends share: fetch and check, encode, release, denoise, decode.

The caller chooses which networks are released in between: `QwenImagePipeline` and `runtime/session.py` both call here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from ..images.pixels import opaque_as_rgb, to_images
from ..names import CaptionLanguage
from ..registry import TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE_DECODER, VAE_ENCODER, VISION
from ..variants import Variant
from .advice import advise
from .conditioning import EncodingModel, Encodings, GuidanceEncoding, InitialImage
from .metadata import Described, describe
from .parameters import GenerationParameters, check_fits
from .progress import ProgressCallback
from .request import Request
from .seams import ControlInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.geometry import Size
    from .control import Control
    from .decomposition import LayeredResult

logger: logging.Logger = logging.getLogger(__name__)


class Conducted(Described, EncodingModel, Protocol):
    """The core calls of a pipeline and its control over memory; `QwenImagePipeline` is one."""

    strip_pixels: int

    @property
    def variant(self) -> Variant:
        """What the checkpoint's pipeline class implies."""

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the text encoder and the transformer."""

    def prepare(self) -> None:
        """Fetches and checks all files."""

    def caption_image(
        self, image: Image, *, language: CaptionLanguage, resolution: int, progress: ProgressCallback | None
    ) -> str:
        """An image's caption."""

    def encode_guidance_prompts(
        self, prompt: str, negative_prompt: str | None = None, *, images: Sequence[Image],
        reference_pixels: int | None, progress: ProgressCallback | None,
    ) -> GuidanceEncoding:  # fmt: skip
        """Encoded prompts and images."""

    def encode_initial_image(
        self, image: Image, size: Size, mask: Image | None = None, *, progress: ProgressCallback | None
    ) -> InitialImage:
        """Encodes an image to start from."""

    def open_controls(self, controls: Sequence[Control]) -> tuple[str, ...]:
        """Fetches and checks ControlNets and their images."""

    def encode_controls(
        self, controls: Sequence[Control], size: Size, *, progress: ProgressCallback | None
    ) -> tuple[ControlInput, ...]:
        """Opens ControlNets and encodes their images."""

    def denoise_latents(
        self, parameters: GenerationParameters, encoding: GuidanceEncoding, *, seed: int, image_index: int,
        initial: InitialImage | None, controls: Sequence[ControlInput], progress: ProgressCallback | None,
    ) -> mx.array:  # fmt: skip
        """Clean latents."""

    def decode_frames(
        self, parameters: GenerationParameters, latents: mx.array, *, progress: ProgressCallback | None
    ) -> Iterator[mx.array]:
        """Pixels, frame by frame."""

    def release_encoders(self) -> None:
        """Frees the memory of all encoders."""

    def release_transformer(self) -> None:
        """Frees the transformer's memory."""


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image with its metadata."""

    image: Image
    metadata: dict[str, Any]


def generate(
    pipeline: Conducted,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
    *,
    release_encoders: bool = False,
    release_transformer: bool = False,
) -> Iterator[GeneratedImage]:
    """Yields the request's images one by one.

    Args:
        pipeline: the opened checkpoint.
        request: the request.
        progress: called for every stage and step; can cancel.
        cache: encodings of earlier runs; on a hit no encoder is loaded.
        release_encoders: whether encoders are released before the first image.
        release_transformer: whether the transformer is released before the last image is decoded.
    """
    advise([request], pipeline.variant)
    encoding = encode(pipeline, request, progress, cache)
    initial = encode_canvas(pipeline, request, progress)
    controls = encode_controls(pipeline, request, progress)
    if release_encoders:
        pipeline.release_encoders()
    for image, seed, index in generate_encoded(
        pipeline, request, encoding, initial, progress, release_transformer, controls
    ):
        yield GeneratedImage(image, describe(pipeline, request, encoding, seed, index))


def decompose(
    pipeline: Conducted,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
    *,
    release_encoders: bool = False,
    release_transformer: bool = False,
) -> LayeredResult:
    """Decomposes an image; layers are decoded, resized and stored in 8 bits one by one. Arguments as in `generate`."""
    from .decomposition import layered_result  # here: most runs make no layers

    encoding = encode(pipeline, request, progress, cache)
    if release_encoders:
        pipeline.release_encoders()
    images = [
        image for image, _, _ in generate_encoded(pipeline, request, encoding, None, progress, release_transformer)
    ]
    return layered_result(images, request, describe(pipeline, request, encoding, request.seeds[0]))


def encode(
    pipeline: Conducted,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: Encodings | None = None,
) -> GuidanceEncoding:
    """A request's prompts and images, encoded now or by an earlier run; all files are fetched and checked before.

    Args:
        pipeline: the opened checkpoint.
        request: the request.
        progress: called for every stage; can cancel.
        cache: encodings of earlier runs; a new encoding is stored there.

    Raises:
        RequestError: the model does not generate images of that size, or not in that number of steps.
    """
    check_fits(request.parameters, pipeline.variant)
    pipeline.prepare()
    if request.controls:
        pipeline.open_controls(request.steering)
    encoding = cache.get(pipeline, request) if cache else None
    if encoding is not None:
        logger.info("the encoding comes from the cache; no text encoder is loaded")
        return encoding
    encoding = encode_request(pipeline, request, progress)
    if cache:
        cache.put(pipeline, request, encoding)
    return encoding


def encode_request(pipeline: Conducted, request: Request, progress: ProgressCallback | None = None) -> GuidanceEncoding:
    """Encodes a request's prompts and images; the negative prompt is left out if it has no effect.

    A layered model without a prompt captions the image, always with the same random draws, because the seed is that of
    the noise alone.
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
        images=request.shown,
        reference_pixels=request.reference_pixels,
        progress=progress,
    )


def encode_canvas(
    pipeline: Conducted, request: Request, progress: ProgressCallback | None = None
) -> InitialImage | None:
    """Encodes a request's initial image and mask; None if generation begins with noise alone."""
    if not request.starts_from_canvas:
        return None
    canvas = request.canvas
    assert canvas is not None
    image, mask = canvas.initial
    if not math.isclose(image.width / image.height, canvas.size[0] / canvas.size[1], rel_tol=0.05):
        logger.warning(
            "an image of %dx%d pixels is stretched to %dx%d, the size to generate at",
            *image.size,
            *canvas.size,
        )
    return pipeline.encode_initial_image(image, canvas.size, mask, progress=progress)


def encode_controls(
    pipeline: Conducted, request: Request, progress: ProgressCallback | None = None
) -> tuple[ControlInput, ...]:
    """Encodes the images of a request's controls."""
    if not request.controls:
        return ()
    size = request.parameters.width, request.parameters.height
    return pipeline.encode_controls(request.steering, size, progress=progress)


def generate_encoded(
    pipeline: Conducted,
    request: Request,
    encoding: GuidanceEncoding,
    initial: InitialImage | None,
    progress: ProgressCallback | None = None,
    release_transformer: bool = False,
    controls: Sequence[ControlInput] = (),
) -> Iterator[tuple[Image, int, int]]:
    """Yields a request's images, (image, seed, index) each; may drop the transformer before the last is decoded."""
    draws = list(product(request.seeds, request.image_indices))
    for seed, index in draws:
        latents = pipeline.denoise_latents(
            request.parameters, encoding, seed=seed, image_index=index, initial=initial, controls=controls,
            progress=progress,
        )  # fmt: skip
        if release_transformer and (seed, index) == draws[-1]:
            pipeline.release_transformer()
        for frame in pipeline.decode_frames(request.parameters, latents, progress=progress):
            (image,) = to_images(frame[None])
            finished = request.canvas.finish(image) if request.canvas else image
            if image.mode == "RGBA" and not pipeline.variant.layered:
                finished = opaque_as_rgb(finished)
            yield finished, seed, index


@contextmanager
def keeping(pipeline: Conducted, streamed: Collection[str], strip_pixels: int) -> Iterator[None]:
    """Inside the block, streams these components and decodes at most `strip_pixels` pixels at once.

    Components loaded in a different way are released, before and afterwards.
    """
    before = pipeline.components.streamed, pipeline.strip_pixels
    pipeline.components.stream(streamed)
    pipeline.strip_pixels = strip_pixels
    try:
        yield
    finally:
        pipeline.components.stream(before[0])
        pipeline.strip_pixels = before[1]


def load(pipeline: Conducted, request: Request) -> None:
    """Loads the components that a request needs, unless they are loaded."""
    components = pipeline.components
    components.load(TOKENIZER, TEXT_ENCODER, TRANSFORMER, VAE_DECODER)
    if request.images:
        components.load(VAE_ENCODER)
    if request.images and pipeline.variant.encoder_area:
        components.load(VISION)
