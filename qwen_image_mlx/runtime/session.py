"""Works a request through with as little in memory as possible: encode, release the encoders, then paint.

The pipeline below has no policy; this is where one is chosen. Printing and files are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.progress import ProgressCallback
    from ..pipeline.request import Request
    from .cache import EncodingCache


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painting:
    """A finished picture, and all it takes to paint it again."""

    image: Image
    metadata: dict[str, Any]


def paint(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: EncodingCache | None = None,
) -> Iterator[Painting]:
    """Yields the request's pictures one by one; the encoders are gone before the first is begun.

    Args:
        pipeline: the opened checkpoint.
        request: what to paint.
        progress: told of every stage and step, and can cancel.
        cache: encodings of earlier runs; with a hit no encoder is loaded.
    """
    if not request.prompt.strip():
        logger.warning("the prompt is empty: the model paints whatever it likes")
    if len(request.images) > 2:
        logger.warning(
            "%d pictures are shown to the model, each as costly in every step as a target of its size; "
            "--reference-pixels makes them smaller",
            len(request.images),
        )
    pipeline.prepare()
    encoding = cache.get(pipeline, request) if cache else None
    if encoding is None:
        encoding = pipeline.encode_request(request, progress)
        if cache:
            cache.put(pipeline, request, encoding)
    initial = pipeline.encode_canvas(request, progress)
    pipeline.release_encoders()
    for image, seed, index in pipeline.paint_request(request, encoding, initial, progress):
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
        "strength": parameters.strength if pipeline.starts_from_canvas(request) else None,
        "dtype": str(pipeline.dtype).rpartition(".")[2],
        "version": __version__,
    }
