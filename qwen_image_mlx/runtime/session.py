"""Works a request through with as little in memory as possible: encode, release the encoders, then paint.

The two core calls have no policy; the command line's is here. Printing and files are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..pipeline.metadata import describe
from .memory import DEFAULT, Residency

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.conditioning import GuidanceEncoding
    from ..pipeline.decomposition import LayeredResult
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.progress import ProgressCallback
    from ..pipeline.request import Request
    from .cache import EncodingCache, RecentEncodings


logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painting:
    """A finished picture, and how the pipeline painted it."""

    image: Image
    metadata: dict[str, Any]


def paint(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: EncodingCache | RecentEncodings | None = None,
    residency: Residency = DEFAULT,
) -> Iterator[Painting]:
    """Yields the request's pictures one by one.

    Args:
        pipeline: the opened checkpoint.
        request: what to paint.
        progress: told of every stage and step, and can cancel.
        cache: encodings of earlier runs; with a hit no encoder is loaded.
        residency: staged, the encoders are gone before the first picture is begun, and the transformer before the last
            is decoded.
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
    initial = pipeline.encode_canvas(request, progress)
    if residency.staged:
        pipeline.release_encoders()
    pictures = pipeline.paint_request(request, encoding, initial, progress, release=residency.staged)
    for image, seed, index in pictures:
        yield Painting(image, describe(pipeline, request, encoding, seed, index))


def decompose(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None = None,
    cache: EncodingCache | RecentEncodings | None = None,
    residency: Residency = DEFAULT,
) -> LayeredResult:
    """Takes a picture apart; the arguments are those of `paint`. The cache keeps the caption with the encoding."""
    encoding = encoded(pipeline, request, progress, cache)
    if residency.staged:
        pipeline.release_encoders()
    return pipeline.decompose_request(request, encoding, progress, release=residency.staged)


def encoded(
    pipeline: QwenImagePipeline,
    request: Request,
    progress: ProgressCallback | None,
    cache: EncodingCache | RecentEncodings | None,
) -> GuidanceEncoding:
    """A request's prompts and pictures, encoded now or by an earlier run; all files are fetched and checked before."""
    pipeline.prepare()
    encoding = cache.get(pipeline, request) if cache else None
    if encoding is None:
        encoding = pipeline.encode_request(request, progress)
        if cache:
            cache.put(pipeline, request, encoding)
    return encoding
