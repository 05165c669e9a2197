"""ControlNets of random values for a tiny checkpoint, made without torch from the weights map."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.registry import CONTROLS
from qwen_image_mlx.weights.mapping import expected_tensors
from qwen_image_mlx.weights.safetensors_files import save_tensors
from qwen_image_mlx.weights.synthetic import random_values

INSTANTX = "QwenImageControlNetModel"
FUN = "QwenImageFunControlNet"
FUN_21 = "QwenImage21FunControlNet"
BLOCKWISE = "QwenImageBlockWiseControlNet"


def write_control(
    path: Path, model: Path, name: str, *, layers: int, extra: int = 0, seed: int = 0, strength: float = 1.0, **changes
) -> Path:
    """Writes a ControlNet for a model, with `extra` condition channels a latent; returns the file."""
    base = QwenImagePipeline.from_pretrained(model, dtype="float32").transformer_config
    (row,) = CONTROLS[name].components
    same = {field.name: getattr(base, field.name) for field in fields(base)} | changes
    channels = base.in_channels + extra * base.patch_size**2
    config = row.config(**same | {"num_layers": layers, "condition_channels": channels})
    specs = expected_tensors(row, config)
    keys = mx.random.split(mx.random.key(seed), len(specs))
    tensors = {spec.name: strength * random_values(spec, keys[n]) for n, spec in enumerate(specs.values())}
    save_tensors(path, tensors, {"format": "pt"})
    return path


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture of many colours, RGB."""
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width: int, height: int) -> Image.Image:
    """White in a box inside, black around it."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, height))
    return mask
