"""The Qwen-Image family on Apple Silicon, in pure MLX.

Public names are resolved when they are first used, so importing this package costs nothing.

It sets one environment variable, `MLX_ENABLE_TF32=0`, unless that is set already. On an M5 with macOS 26.2 or newer MLX
otherwise rounds the factors of fp32 products to 10 bits (TF32), and the autoencoder and all fp32 runs are inexact. MLX
reads the variable once, at its first product, and for the whole process: import this package before that, and know that
the app's own fp32 products follow it (bf16 and fp16 are as fast as before). To keep TF32, set the variable to 1 first.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

os.environ.setdefault("MLX_ENABLE_TF32", "0")

_PUBLIC = {
    "QwenImagePipeline": "pipeline.pipeline",
    "Control": "pipeline.control",
    "GenerationParameters": "pipeline.parameters",
    "GuidanceEncoding": "pipeline.conditioning",
    "InitialImage": "pipeline.conditioning",
    "LayeredResult": "pipeline.decomposition",
    "compose": "layers.recompose",
    "ignore_profiles": "images.colour",
    "pack_multi_layer_latents": "sampling.latents",
    "unpack_multi_layer_latents": "sampling.latents",
    "Progress": "pipeline.progress",
    "HubSnapshot": "weights.snapshot",
    "Quantization": "weights.schemes",
    "QwenImageError": "errors",
    "RequestError": "errors",
    "CheckpointError": "errors",
    "GPUError": "errors",
    "HubError": "errors",
    "OutputError": "errors",
    "Cancelled": "errors",
    "Preview": "runtime.preview",
    "to_images": "images.pixels",
}

# A literal, for type checkers; a test keeps it equal to the table.
__all__ = [
    "Cancelled",
    "CheckpointError",
    "Control",
    "GPUError",
    "GenerationParameters",
    "GuidanceEncoding",
    "HubError",
    "HubSnapshot",
    "InitialImage",
    "LayeredResult",
    "OutputError",
    "Preview",
    "Progress",
    "Quantization",
    "QwenImageError",
    "QwenImagePipeline",
    "RequestError",
    "__version__",
    "compose",
    "ignore_profiles",
    "pack_multi_layer_latents",
    "to_images",
    "unpack_multi_layer_latents",
]

if TYPE_CHECKING:
    from .errors import Cancelled, CheckpointError, GPUError, HubError, OutputError, QwenImageError, RequestError
    from .images.colour import ignore_profiles
    from .images.pixels import to_images
    from .layers.recompose import compose
    from .pipeline.conditioning import GuidanceEncoding, InitialImage
    from .pipeline.control import Control
    from .pipeline.decomposition import LayeredResult
    from .pipeline.parameters import GenerationParameters
    from .pipeline.pipeline import QwenImagePipeline
    from .pipeline.progress import Progress
    from .runtime.preview import Preview
    from .sampling.latents import pack_multi_layer_latents, unpack_multi_layer_latents
    from .weights.schemes import Quantization
    from .weights.snapshot import HubSnapshot


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
