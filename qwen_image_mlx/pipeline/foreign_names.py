"""Names that users of diffusers type, answered with the name here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .sampling_options import SamplingOptions

P = ParamSpec("P")
T = TypeVar("T")

ARGUMENTS = {
    "true_cfg_scale": "cfg_scale",
    "guidance_scale": "cfg_scale",
    "guidance": "cfg_scale",
    "steps": "num_inference_steps",
    "generator": "seed",
    "num_images_per_prompt": "num_images",
    "callback_on_step_end": "progress",
    "callback": "progress",
    "mask_image": "mask",
    "padding_mask_crop": "mask_padding",
    "layers": "num_layers",
    "torch_dtype": "dtype",
}
METHODS = {
    "__call__": "call generate, edit or decompose",
    "load_lora_weights": "give loras=[…] to from_pretrained, or call set_loras([…])",
    "set_adapters": "call set_loras([…])",
    "unload_lora_weights": "call set_loras([])",
    "fuse_lora": "give lora_mode='merge' to from_pretrained",
    "enable_model_cpu_offload": "nothing is needed: generate releases the encoders before it generates (staged=True)",
    "enable_sequential_cpu_offload": "give streamed=[…] to from_pretrained",
    "enable_vae_tiling": "nothing is needed: large images are decoded in strips, bit for bit the same",
    "enable_vae_slicing": "nothing is needed: images are decoded one by one",
    "set_progress_bar_config": "give progress=False to the call",
    "save_pretrained": "use `qwen-image-mlx quantize`",
    "to": "nothing is needed: MLX uses the GPU by itself",
}


def answering(method: Callable[P, T]) -> Callable[P, T]:
    """Makes a method raise a TypeError for an unknown argument, with the name here of another library's, or the nearest
    name there is."""
    parameters = inspect.signature(method).parameters
    known = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if len(known) < len(parameters):
        known |= SamplingOptions.__annotations__.keys()

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs.keys() - known:
            if (ours := ARGUMENTS.get(name)) in known:
                raise TypeError(f"{method.__name__}() has no argument {name}: give {ours}")
            near = "".join(f"; did you mean {one}?" for one in get_close_matches(name, known, 1))
            raise TypeError(f"{method.__name__}() got an unexpected keyword argument '{name}'{near}")
        return method(*args, **kwargs)

    return call


class Answering:
    """Raises errors with a hint for a pipeline's call and for methods that only diffusers' pipelines have."""

    if not TYPE_CHECKING:  # hidden from type checkers, which find a wrong name themselves

        def __call__(self, *_args, **_kwargs):
            """Raises TypeError with the equivalent here."""
            raise TypeError(f"a pipeline is not called: {METHODS['__call__']}")

        def __getattr__(self, name):
            raise AttributeError(f"a pipeline has no {name}" + (f": {METHODS[name]}" if name in METHODS else ""))
