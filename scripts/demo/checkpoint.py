"""Writes trained weights as checkpoints in the released layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.models.qwen_image.config import TransformerConfig, VAEConfig
from qwen_image_mlx.variants import OWN, VARIANTS
from qwen_image_mlx.weights.mapping import TensorSpec, expected_tensors
from qwen_image_mlx.weights.safetensors_files import save_tensors
from qwen_image_mlx.weights.synthetic import ROWS

from .scenes import SIDE
from .text_encoder import write_text_encoder
from .tokenizer import write_tokenizer

PIPELINES = {
    "demo": "QwenImagePipeline", "demo-edit": "QwenImageEditPlusPipeline", "demo-layered": "QwenImageLayeredPipeline",
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What they say of themselves in model_index.json.
_OWN = {
    "demo": {"target_area": SIDE**2, "steps": 12, "cfg_scale": 3.0, "negative_prompt": " "},
    "demo-edit": {"encoder_area": SIDE**2, "reference_area": SIDE**2, "target_area": SIDE**2, "steps": 12,
                  "cfg_scale": 2.0, "negative_prompt": " "},
    "demo-layered": {"reference_area": SIDE**2, "resolutions": [SIDE], "captions": False, "steps": 12, "cfg_scale": 1.0,
                     "negative_prompt": " "},
}  # fmt: skip
# Sixteen tokens make an image: the released shift by size would leave nearly no steps to the noise.
SCHEDULER = SchedulerConfig(use_dynamic_shifting=False, shift=2.0)
_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def transformer_config(model: str) -> TransformerConfig:
    """The transformer of one of the demo's models; the first two share theirs."""
    layered = VARIANTS[PIPELINES[model]].layered
    return TransformerConfig(
        num_layers=4, num_attention_heads=4, attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=128,
        zero_cond_t=not layered, use_additional_t_cond=layered, use_layer3d_rope=layered,
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
    scheduler = {"_class_name": _CLASSES["scheduler"][1], **asdict(SCHEDULER)}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_component(folder, "vae", vae, weights)
    special = write_tokenizer(folder / "tokenizer")
    write_text_encoder(folder, special, seed)
    processor = {"processor": ["transformers", "Qwen2VLProcessor"]} if VARIANTS[pipeline].takes_images else {}
    index = {"_class_name": pipeline, OWN: _OWN[model], **_CLASSES, **processor}
    write_json(folder / "model_index.json", index)


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
        for name, spec in expected_tensors(ROWS[component], config).items()
    }
    (folder / component).mkdir(parents=True, exist_ok=True)
    save_tensors(folder / component / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / component / "config.json", {"_class_name": class_name, **asdict(config)})


def write_preview(folder: Path, rows: list[list[float]]) -> None:
    """Adds how its latents are shown to what a model says of itself."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[OWN]["preview"] = rows
    write_json(folder / "model_index.json", index)


def pack(models: Path, to: Path) -> None:
    """Copies models into one folder; a part that several have alike goes to `shared`, once.

    Args:
        models: the folder of `PIPELINES`' models.
        to: where the copies go; a part's folder that is there already is replaced.
    """
    parts = sorted({part.name for model in PIPELINES for part in (models / model).iterdir() if part.is_dir()})
    for part in parts:
        owners = [models / model / part for model in PIPELINES if (models / model / part).exists()]
        shared = [owner for owner in owners if _same(owner, models / "demo-edit" / part)]
        places = {to / "shared" / part: models / "demo-edit" / part} if shared else {}
        places |= {to / owner.parent.name / part: owner for owner in owners if owner not in shared}
        for place, source in places.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place)
    for model in PIPELINES:
        (to / model).mkdir(parents=True, exist_ok=True)
        shutil.copy(models / model / "model_index.json", to / model)


def _same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files."""
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


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
