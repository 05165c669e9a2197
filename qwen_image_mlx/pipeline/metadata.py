"""The record of a result, from which it can be made again."""

from __future__ import annotations

import math
from typing import Any, Protocol

import mlx.core as mx

from .._version import __version__
from ..registry import FOLDERS
from ..variants import Variant
from ..weights.schemes import NONE
from .components import Components
from .conditioning import GuidanceEncoding
from .request import Request


class Described(Protocol):
    """The properties of a pipeline that a record has; `QwenImagePipeline` is one."""

    components: Components

    @property
    def model(self) -> str:
        """The checkpoint's directory or id."""

    @property
    def revision(self) -> str | None:
        """Its commit; None for a local folder."""

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the text encoder and the transformer."""

    @property
    def variant(self) -> Variant:
        """What the checkpoint's pipeline class implies."""


def describe(
    pipeline: Described, request: Request, encoding: GuidanceEncoding | None, seed: int, image_index: int = 0
) -> dict[str, Any]:
    """The metadata of one result: everything that the pipeline knows about its generation, JSON-serialisable.

    Without an encoding (None), the prompt is the request's own.
    """
    parameters, parts = request.parameters, pipeline.components
    sampled = parameters.recorded("always", "started from", "set")
    if not request.starts_from_canvas:
        sampled |= dict.fromkeys(parameters.recorded("started from"))
    metadata = {
        "model": pipeline.model,
        "revision": pipeline.revision,
        "prompt": encoding.source.prompt if encoding else request.prompt,
        "negative_prompt": request.guiding_prompt,
        # Keep the order: the file names of batches are made from it.
        **{name: sampled.pop(name) for name in ("width", "height", "steps", "cfg_scale")},
        "seed": seed,
        "image_index": image_index,
        **sampled,
        "dtype": str(pipeline.dtype).rpartition(".")[2],
        "quantize": None if str(parts.quantization) == NONE else str(parts.quantization),
        "loras": list(parts.adapters.references) if parts.adapters else None,
        **{name: str(parts.sources.replaced.get(name, "")) or None for name in FOLDERS},
        "version": __version__,
    }
    if request.controls:  # absent where there are none: files of batches are named by all that is here
        metadata["controls"] = [control.recorded() for control in request.controls]
    if request.preset is not None:
        metadata["preset"] = request.preset
    if encoding is not None and parameters.step_cache:
        metadata["passes"] = parts.passes._asdict()
    if pipeline.variant.layered:
        assert request.reference_pixels is not None
        metadata |= parameters.recorded("layered") | {
            "resolution": math.isqrt(request.reference_pixels),
            "caption_language": None if request.prompt.strip() else request.caption_language,
        }
    return metadata
