"""Works a request through with as little in memory as possible: encode, release the encoders, then paint.

The pipeline below has no policy; this is where one is chosen. Printing and files are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..images.pixels import to_images
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.progress import ProgressCallback


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painting:
    """A finished picture, and all it takes to paint it again."""

    image: Image
    metadata: dict[str, Any]


def paint(
    pipeline: QwenImagePipeline, request: Request, progress: ProgressCallback | None = None
) -> Iterator[Painting]:
    """Yields the request's pictures one by one; the text encoder is gone before the first is begun."""
    if not request.prompt.strip():
        logger.warning("the prompt is empty: the model paints whatever it likes")
    pipeline.prepare()
    guided = request.parameters.cfg_scale > 1
    encoding = pipeline.encode_guidance_prompts(
        request.prompt, request.negative_prompt if guided else None, progress=progress
    )
    pipeline.release_encoders()
    for seed in request.seeds:
        for index in request.image_indices:
            pixels = pipeline.generate_pixels(
                request.parameters, encoding, seed=seed, image_index=index, progress=progress
            )
            for image in to_images(pixels):
                yield Painting(image, describe(pipeline, request, seed, index))


def describe(pipeline: QwenImagePipeline, request: Request, seed: int, image_index: int) -> dict[str, Any]:
    """The metadata of one picture, under the names `generate --from-image` reads."""
    parameters = request.parameters
    return {
        "model": pipeline.model,
        "revision": pipeline.revision,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt if parameters.cfg_scale > 1 else None,
        "width": parameters.width,
        "height": parameters.height,
        "steps": parameters.num_inference_steps,
        "cfg_scale": parameters.cfg_scale,
        "seed": seed,
        "image_index": image_index,
        "rng": parameters.rng,
        "sigmas": parameters.sigmas,
        "shift": parameters.shift,
        "dtype": str(pipeline.dtype).rpartition(".")[2],
        "version": __version__,
    }
