"""Writes trained weights as checkpoints in the released layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_image_mlx.config import SchedulerConfig, TransformerConfig, VAEConfig
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.mapping import TensorSpec, expected_tensors
from qwen_image_mlx.weights.shards import save_tensors

from .text_encoder import write_text_encoder
from .tokenizer import write_tokenizer

PIPELINES = {
    "demo": "QwenImagePipeline", "demo-edit": "QwenImageEditPlusPipeline", "demo-layered": "QwenImageLayeredPipeline",
}  # fmt: skip
# Sixteen tokens make a picture: the released shift by size would leave nearly no steps to the noise.
SCHEDULER = SchedulerConfig(use_dynamic_shifting=False, shift=2.0)
_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def transformer_config(model: str) -> TransformerConfig:
    """The transformer of one of the demo's models; the first two share their weights."""
    layered = VARIANTS[PIPELINES[model]].layered
    return TransformerConfig(
        num_layers=4, num_attention_heads=4, attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=128,
        zero_cond_t=model == "demo-edit", use_additional_t_cond=layered, use_layer3d_rope=layered,
    )  # fmt: skip


def write_frame(folder: Path, model: str, vae: VAEConfig, weights: Mapping[str, mx.array], seed: int = 0) -> None:
    """Writes everything of a model but its transformer.

    Args:
        folder: of the model.
        model: one of `PIPELINES`.
        vae: config of its autoencoder, with the latents' statistics.
        weights: of its autoencoder.
        seed: of the text encoder's weights.
    """
    pipeline = PIPELINES[model]
    processor = {"processor": ["transformers", "Qwen2VLProcessor"]} if VARIANTS[pipeline].takes_images else {}
    write_json(folder / "model_index.json", {"_class_name": pipeline, **_CLASSES, **processor})
    scheduler = {"_class_name": _CLASSES["scheduler"][1], **asdict(SCHEDULER)}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_component(folder, "vae", vae, weights)
    special = write_tokenizer(folder / "tokenizer")
    write_text_encoder(folder, special, vision=bool(processor), seed=seed)


def write_component(
    folder: Path, component: str, config: Any, weights: Mapping[str, mx.array], dtype: mx.Dtype = mx.bfloat16
) -> None:
    """Writes `transformer/` or `vae/`.

    Args:
        folder: of the model.
        component: "transformer" or "vae".
        config: its dataclass.
        weights: every tensor an image needs, by its name in the file and laid out as in our modules.
        dtype: of the file.
    """
    class_name = {"transformer": "QwenImageTransformer2DModel", "vae": "AutoencoderKLQwenImage"}[component]
    tensors = {
        name: in_file_layout(spec, weights.get(name)).astype(dtype)
        for name, spec in expected_tensors(component, config).items()
    }
    (folder / component).mkdir(parents=True, exist_ok=True)
    save_tensors(folder / component / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / component / "config.json", {"_class_name": class_name, **asdict(config)})


def in_file_layout(spec: TensorSpec, value: mx.array | None) -> mx.array:
    """A module's array as its file has it; of a kernel's temporal taps only the last one, which one frame meets, is
    not zero, and a tensor that no image needs (None) is all zeros."""
    if value is None:
        assert spec.part == "unused", spec.name
        return mx.zeros(spec.shape)
    if spec.layout == "conv":
        value = value.transpose(0, 3, 1, 2)
        if len(spec.shape) == 5:
            value = mx.pad(value[:, :, None], [(0, 0), (0, 0), (spec.shape[2] - 1, 0), (0, 0), (0, 0)])
    return value.reshape(spec.shape)


def write_json(path: Path, value: object) -> None:
    """Indented, with a line's end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
