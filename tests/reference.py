"""What the tests need from the reference libraries: models of the real classes, and runs of them.

Everything here is made with torch, diffusers and transformers alone; nothing of `qwen_image_mlx` is called, so a
comparison with it compares two independent implementations.
"""

import functools
import json
import os
import zlib
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from checkpoints import REAL_CONFIGS, Config
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
for _logging in (diffusers_logging, transformers_logging):
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()

Model = TypeVar("Model", bound=torch.nn.Module)

# --- models --------------------------------------------------------------------------------------------------------


_SPREAD = 0.2
_PIXEL_SPREAD = 0.32  # most pixels lie well inside [-1, 1] and few reach its ends
_LOGIT_GAIN = 2.0  # attention that picks out tokens, so that a wrong position or a wrong prompt shows
_LOGIT_NORMS = tuple(f".attn.norm_{role}.weight" for role in ("q", "k", "added_q", "added_k"))


def make_transformer(config: Config, *, seed: int = 0) -> QwenImageTransformer2DModel:
    """The reference's transformer of that config.json, with seeded values everywhere."""
    return _filled(QwenImageTransformer2DModel.from_config(config), seed, "transformer")


def make_vae(config: Config, *, seed: int = 0) -> AutoencoderKLQwenImage:
    """The reference's VAE of that config.json, with seeded values everywhere."""
    return _with_pixels_in_range(_filled(AutoencoderKLQwenImage.from_config(config), seed, "vae"))


def make_text_encoder(config: Config, *, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The reference's text encoder of that config.json, with seeded fp32 values everywhere."""
    fp32 = deepcopy(config) | {"torch_dtype": "float32"}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(fp32))
    return _filled(model, seed, "text_encoder")


def _filled(model: Model, seed: int, component: str) -> Model:
    """The model in eval mode, every parameter overwritten; each component has its own stream of random numbers."""
    generator = torch.Generator("cpu").manual_seed(seed * 0x10000 + zlib.crc32(component.encode()) % 0x10000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_spread_values(name, noise))
    return model.eval()


@torch.no_grad()
def _with_pixels_in_range(model: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """The VAE with its last convolution scaled so that latents of the real statistics decode to pixels in range."""
    noise = torch.randn(1, model.config.z_dim, 1, 16, 16, generator=torch.Generator("cpu").manual_seed(0))
    statistics = (model.config.latents_mean, model.config.latents_std)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
    pixels = model.decoder(model.post_quant_conv(noise * std + mean))
    gain = _PIXEL_SPREAD / pixels.std(dim=(0, 2, 3, 4))
    last = model.decoder.conv_out
    last.weight.mul_(gain.view(-1, 1, 1, 1, 1))
    last.bias.sub_(pixels.mean(dim=(0, 2, 3, 4))).mul_(gain)
    return model


def _spread_values(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Values that keep activations at order one and leave nothing at its neutral value."""
    if name.endswith(".bias"):
        return noise * _SPREAD
    if name.endswith(_LOGIT_NORMS):
        return _LOGIT_GAIN * (1 + noise * _SPREAD)
    if noise.ndim == 1 or name.endswith(".gamma"):
        return 1 + noise * _SPREAD
    if "embed_tokens" in name or "embedding.weight" in name:
        return noise
    return noise / _fan_in(noise.shape) ** 0.5


def _fan_in(shape: torch.Size) -> int:
    """Inputs that reach one output. Of a 3-D kernel's temporal taps a single frame meets only one."""
    kernel = shape[-1] * shape[-2] if len(shape) > 2 else 1
    return shape[1] * kernel


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# --- spellings of the text encoder ---------------------------------------------------------------------------------

_TEXT_PREFIXES = {"official": "model.", "nested": "model.language_model.", "bare": "language_model."}
_VISUAL_PREFIXES = {"official": "visual.", "nested": "model.visual.", "bare": "visual."}


def rename_text_encoder_keys(directory: Path, spelling: str, *, config: str = "flat") -> Path:
    """Respell a written checkpoint's text encoder in place, keeping its shards.

    `spelling`: "official" (`model.layers.0…`, `visual.…`), "nested" (`model.language_model.…`, `model.visual.…`) or
    "bare" (`language_model.…`, `visual.…`); `lm_head.weight` is the same in all. `config`: "flat" (text fields at
    the top, transformers before 4.52), "nested" (under `text_config`, transformers 5) or "both" (in both places, with
    rope type "default": transformers 4.52 to 4.57, which saved the official Qwen-Image encoder).
    """
    folder = directory / "text_encoder"
    for path in folder.glob("*.safetensors"):
        tensors = {_respell(name, spelling): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {_respell(name, spelling): shard for name, shard in index["weight_map"].items()}
        _write_json(path, index)
    path = folder / "config.json"
    flat = _flat_config(json.loads(path.read_text(encoding="utf-8")))
    layouts = {"flat": deepcopy, "nested": _nested_config, "both": _both_config}
    _write_json(path, layouts[config](flat))
    return directory


def official_name(name: str) -> str:
    """A tensor's name as the official text encoder spells it; other components' names stay."""
    return _respell(name, "official")


def _respell(name: str, spelling: str) -> str:
    for prefixes in (_VISUAL_PREFIXES, _TEXT_PREFIXES):
        for prefix in sorted(prefixes.values(), key=len, reverse=True):
            if name.startswith(prefix):
                return prefixes[spelling] + name.removeprefix(prefix)
    return name


def _flat_config(config: Config) -> Config:
    """Any layout, with the text fields at the top only."""
    text = {key: value for key, value in config.get("text_config", {}).items() if key != "dtype"}
    outer = {key: value for key, value in config.items() if key not in ("text_config", "dtype")}
    rope = text.pop("rope_parameters", None) or {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    return {
        **text,
        **outer,
        "rope_scaling": {"mrope_section": rope["mrope_section"], "type": "mrope"},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": config.get("torch_dtype") or config["dtype"],
    }


def _nested_config(flat: Config) -> Config:
    return json.loads(Qwen2_5_VLConfig.from_dict(deepcopy(flat)).to_json_string())


def _both_config(flat: Config) -> Config:
    rope_scaling = {**flat["rope_scaling"], "rope_type": "default", "type": "default"}
    vision = {**flat["vision_config"], "in_channels": 3}
    outer = {**flat, "rope_scaling": rope_scaling, "vision_config": vision, "transformers_version": "4.53.1"}
    text = {key: value for key, value in outer.items() if key not in ("vision_config", "transformers_version")}
    text |= {
        "image_token_id": None,
        "layer_types": ["full_attention"] * flat["num_hidden_layers"],
        "model_type": "qwen2_5_vl_text",
        "sliding_window": None,
        "torch_dtype": "float32",
        "video_token_id": None,
    }
    return {**outer, "text_config": text}


# --- runs of the reference -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceRun:
    """One generation by the reference: latents are packed (images, tokens, 64) and fp32, whatever the run's dtype."""

    initial_noise: np.ndarray
    latents: list[np.ndarray]
    images: list[Image.Image]
    prompt_embeds: np.ndarray
    negative_prompt_embeds: np.ndarray | None

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> QwenImagePipeline:
    """The reference's pipeline of a checkpoint, on the CPU."""
    pipeline = QwenImagePipeline.from_pretrained(directory, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def run_reference(
    pipe: QwenImagePipeline,
    *,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
    width: int,
    height: int,
    steps: int,
    cfg_scale: float,
    seed: int,
    num_images: int = 1,
    sigmas: list[float] | None = None,
) -> ReferenceRun:
    """Generate with the reference and keep what a comparison needs; the embeddings are those before repetition."""
    latents: list[np.ndarray] = []

    def keep_latents(_pipe: QwenImagePipeline, _step: int, _time: torch.Tensor, state: Config) -> Config:
        latents.append(to_numpy(state["latents"]))
        return {}

    prompts = [prompt] if isinstance(prompt, str) else prompt
    output = pipe(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        sigmas=sigmas,
        true_cfg_scale=cfg_scale,
        num_images_per_prompt=num_images,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep_latents,
    )
    return ReferenceRun(
        initial_noise=_initial_noise(pipe, len(prompts) * num_images, width, height, seed),
        latents=latents,
        images=output.images,
        prompt_embeds=_encode(pipe, prompt),
        negative_prompt_embeds=None if negative_prompt is None else _encode(pipe, negative_prompt),
    )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values as fp32."""
    return tensor.detach().to(torch.float32).numpy().copy()


def _initial_noise(pipe: QwenImagePipeline, count: int, width: int, height: int, seed: int) -> np.ndarray:
    channels = pipe.transformer.config.in_channels // 4
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = pipe.text_encoder.dtype
    return to_numpy(pipe.prepare_latents(count, channels, height, width, dtype, torch.device("cpu"), generator))


def _encode(pipe: QwenImagePipeline, prompt: str | list[str]) -> np.ndarray:
    embeds, _mask = pipe.encode_prompt(prompt, max_sequence_length=512)
    return to_numpy(embeds)


# --- names and shapes of the real models ---------------------------------------------------------------------------


@functools.cache
def full_size_meta(component: str) -> dict[str, tuple[int, ...]]:
    """Tensor names, spelled as in the official files, and shapes of a full-size component; no memory is allocated.

    `component` is a key of `REAL_CONFIGS` that names a model.
    """
    config = deepcopy(REAL_CONFIGS[component])
    with torch.device("meta"):
        model = _on_meta(component, config)
    return _official_shapes(model.named_parameters())


def _on_meta(component: str, config: Config) -> torch.nn.Module:
    if component.startswith("transformer"):
        return QwenImageTransformer2DModel.from_config(config)
    if component.startswith("vae"):
        return AutoencoderKLQwenImage.from_config(config)
    if component == "text_encoder":
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    raise ValueError(f"not a model: {component}")


def _official_shapes(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    return {official_name(name): tuple(parameter.shape) for name, parameter in parameters}
