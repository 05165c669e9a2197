"""Encodings on disk or in memory, so that the same prompt and images are never encoded twice; bounded in size.

Keyed by everything an encoding depends on: the checkpoint, its template, the dtype, the prompts, the pixels of the
images. A damaged entry is encoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import CheckpointError, OutputError
from ..files import sweep
from ..pipeline.conditioning import EncodingModel, GuidanceEncoding

if TYPE_CHECKING:
    from ..pipeline.request import Request

logger: logging.Logger = logging.getLogger(__name__)

MAX_BYTES = 2_000_000_000
MAX_RECENT_BYTES = 256_000_000


def default_folder() -> Path:
    """`qwen-image-mlx/encodings` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-image-mlx" / "encodings"


class EncodingCache:
    """A folder of encodings.

    Args:
        folder: made when the first entry is put.
        max_bytes: beyond this, the least recently used entries are removed.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES):
        self._folder = folder or default_folder()
        self._max_bytes = max_bytes
        sweep(self._folder)

    def get(self, pipeline: EncodingModel, request: Request) -> GuidanceEncoding | None:
        """The encoding of an equal request, or None."""
        path = self._path(pipeline, request)
        if not path.is_file():
            return None
        try:
            encoding = GuidanceEncoding.load(path)
        except CheckpointError as error:
            logger.warning("a cached encoding is damaged and is encoded again: %s", error)
            return None
        with suppress(OSError):
            os.utime(path)
        return encoding

    def put(self, pipeline: EncodingModel, request: Request, encoding: GuidanceEncoding) -> None:
        """Stores an encoding; if the cache cannot be written, logs a warning."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            encoding.save(self._path(pipeline, request))
            self._shrink()
        except (OSError, OutputError) as error:
            logger.warning("the encoding is not cached: %s", error)

    def _path(self, pipeline: EncodingModel, request: Request) -> Path:
        return self._folder / f"{_key(pipeline, request)}.safetensors"

    def _shrink(self) -> None:
        entries = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in entries:
            total += path.stat().st_size
            if total > self._max_bytes:
                path.unlink(missing_ok=True)


class RecentEncodings:
    """The most recently used encodings, in memory, for a process that keeps running.

    Args:
        max_bytes: beyond this, the least recently used ones are dropped.
    """

    def __init__(self, max_bytes: int = MAX_RECENT_BYTES):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, GuidanceEncoding] = OrderedDict()

    def get(self, pipeline: EncodingModel, request: Request) -> GuidanceEncoding | None:
        """The encoding of an equal request, or None."""
        key = _key(pipeline, request)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, pipeline: EncodingModel, request: Request, encoding: GuidanceEncoding) -> None:
        """Stores an encoding, unless it is larger than the whole cache may be."""
        if encoding.nbytes > self._max_bytes:
            return
        key = _key(pipeline, request)
        self._entries[key] = encoding
        self._entries.move_to_end(key)
        while self.nbytes > self._max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Frees all of them."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all stored encodings."""
        return sum(encoding.nbytes for encoding in self._entries.values())


def _key(pipeline: EncodingModel, request: Request) -> str:
    facts = {
        "version": __version__,
        "checkpoint": pipeline.fingerprint,
        "dtype": str(pipeline.dtype),
        "quantization": str(replace(pipeline.quantization, transformer=None)),
        "variant": repr(pipeline.variant),
        "prompt": request.prompt,
        "negative_prompt": request.guiding_prompt,
        "reference_pixels": request.reference_pixels,
        "caption_language": request.caption_language,
        "images": [(image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in request.shown],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
