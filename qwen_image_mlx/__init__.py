"""The Qwen-Image family on Apple Silicon, in pure MLX.

Public names are resolved when they are first used, so importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "QwenImagePipeline": "pipeline.pipeline",
    "GenerationParameters": "pipeline.parameters",
    "GuidanceEncoding": "pipeline.conditioning",
    "InitialImage": "pipeline.conditioning",
    "LayeredResult": "pipeline.decomposition",
    "compose": "images.recompose",
    "pack_multi_layer_latents": "sampling.latents",
    "unpack_multi_layer_latents": "sampling.latents",
    "Progress": "pipeline.progress",
    "HubSnapshot": "weights.snapshot",
    "Quantization": "weights.quantize",
    "QwenImageError": "errors",
    "RequestError": "errors",
    "CheckpointError": "errors",
    "HubError": "errors",
    "OutputError": "errors",
    "Cancelled": "errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .errors import Cancelled, CheckpointError, HubError, OutputError, QwenImageError, RequestError
    from .images.recompose import compose
    from .pipeline.conditioning import GuidanceEncoding, InitialImage
    from .pipeline.decomposition import LayeredResult
    from .pipeline.parameters import GenerationParameters
    from .pipeline.pipeline import QwenImagePipeline
    from .pipeline.progress import Progress
    from .sampling.latents import pack_multi_layer_latents, unpack_multi_layer_latents
    from .weights.quantize import Quantization
    from .weights.snapshot import HubSnapshot


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
