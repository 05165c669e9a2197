"""What is recorded of a result, so that it can be made again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..weights.quantize import NONE
from .conditioning import GuidanceEncoding
from .request import Request
from .sources import REPLACEABLE

if TYPE_CHECKING:
    from .pipeline import QwenImagePipeline


def describe(
    pipeline: QwenImagePipeline, request: Request, encoding: GuidanceEncoding | None, seed: int, image_index: int = 0
) -> dict[str, Any]:
    """The metadata of one result: all that the pipeline knows of how it was painted, JSON-serialisable.

    Before there is an encoding (None), the prompt is the request's own.
    """
    parameters, parts = request.parameters, pipeline.components
    metadata = {
        "model": pipeline.model,
        "revision": pipeline.revision,
        "prompt": encoding.source.prompt if encoding else request.prompt,
        "negative_prompt": request.guiding_prompt,
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
        "quantize": None if str(parts.quantization) == NONE else str(parts.quantization),
        "loras": list(parts.adapters.references) if parts.adapters else None,
        **{name: str(parts.sources.replaced.get(name, "")) or None for name in REPLACEABLE},
        "version": __version__,
    }
    if pipeline.variant.layered:
        assert request.reference_pixels is not None
        metadata |= {
            "num_layers": parameters.num_layers,
            "resolution": math.isqrt(request.reference_pixels),
            "cfg_normalize": parameters.cfg_normalize,
            "caption_language": None if request.prompt.strip() else request.caption_language,
        }
    return metadata
