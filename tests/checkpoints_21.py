"""Tiny networks of Qwen-Image-2.1 with seeded values, made without torch; and inputs whose results are goldens."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import PROCESSOR, REAL_CONFIGS, Config, merged, spread, write_tokenizer
from goldens import image

from qwen_image_mlx.models.qwen3_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig, VAEConfig
from qwen_image_mlx.registry import CLASSES, component_of
from qwen_image_mlx.variants import OWN, VARIANTS
from qwen_image_mlx.weights.mapping import expected_tensors

# The class's own defaults are the released values of the transformer and of the autoencoder.
REAL_TEXT_ENCODER: Config = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "text_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}

TINY_TRANSFORMER: Config = {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "causal_condition": True,
    "context_in_dim": 64,
    "eps": 1e-6,
    "in_channels": 64,
    "mlp_ratio": 3,
    "num_attention_heads": 3,
    "num_layers": 3,
    "out_channels": 64,
    "patch_size": 1,
}
TINY_VAE: Config = {"base_dim": 4, "decoder_base_dim": 6}
TINY_TEXT_ENCODER = merged(
    REAL_TEXT_ENCODER,
    {
        "text_config": {
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 6,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "deepstack_visual_indexes": [0, 2],
            "depth": 4,
            "hidden_size": 144,
            "intermediate_size": 80,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "out_hidden_size": 64,
        },
    },
)
# Reference images are small in tests; the real limits begin at 256x256.
TINY_PROCESSOR = PROCESSOR | {
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_pixels": 4096**2, "min_pixels": 32**2, "patch_size": 16,
}  # fmt: skip

SMALL_AREA = 96**2


def write_rest_21(folder: Path, sigmas: tuple[float, ...] | None = None, area: int = SMALL_AREA) -> Path:
    """Writes what a checkpoint has beside weights and tokenizer, into `folder` or, for Turbo, into one beside it.

    Args:
        folder: has transformer/, text_encoder/, vae/ and processor/ with the tokenizer's files.
        sigmas: those of Turbo; the weights are linked.
        area: of references and of an edit, in pixels.

    Returns:
        The checkpoint's folder.
    """
    classes = VARIANTS["QwenImage21Pipeline"].classes
    said = {"_class_name": "QwenImage21Pipeline"} | {k: [CLASSES[c].library, c] for k, c in classes.items()}
    areas = dict.fromkeys(("encoder_area", "reference_area", "target_area"), area)
    said |= {"sample_sigmas": sigmas, OWN: areas}
    scheduler = dict(REAL_CONFIGS["scheduler"])
    if sigmas:
        scheduler |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        turbo = folder.with_name(f"{folder.name}-turbo")
        turbo.mkdir()
        for part in ("transformer", "text_encoder", "vae", "processor"):
            (turbo / part).symlink_to(folder / part)
        folder = turbo
    files = {
        "model_index.json": said,
        "scheduler/scheduler_config.json": scheduler,
        "processor/preprocessor_config.json": TINY_PROCESSOR,
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


# --- goldens -------------------------------------------------------------------------------------------------------

SMALL_TEXT_ENCODER = merged(TINY_TEXT_ENCODER, {"text_config": {"vocab_size": 300}})
NETWORKS: dict[str, tuple[str, Any, Config]] = {
    "transformer": ("QwenImage21Transformer2DModel", TransformerConfig, TINY_TRANSFORMER),
    "vae": ("AutoencoderKLQwenImage21", VAEConfig, TINY_VAE),
    "text_encoder": ("Qwen3VLForConditionalGeneration", TextEncoderConfig, SMALL_TEXT_ENCODER),
    "vision": ("Qwen3VLForConditionalGeneration.vision", VisionConfig, SMALL_TEXT_ENCODER),
    "language_head": ("Qwen3VLForConditionalGeneration.language_head", TextEncoderConfig, SMALL_TEXT_ENCODER),
}
"""The weights map of each network, its config's class, and its config."""
_DIM_PIXELS = 0.05  # times the last convolution's values, so that pixels lie inside [-1, 1]

GRID = (4, 6)
TIMES = (1.0, 0.4)
SLOTS = ((3, 4, 4), (9, 2, 8))
"""Of each reference: the first of its places among the states, and its rows and columns of latents."""
PATCHES = (4, 6)
IMAGE_PLACES = slice(5, 11)
"""Of the prompt's 20 tokens, those of an image of `PATCHES`."""


def values_21(network: str, config: Config | None = None) -> dict[str, np.ndarray]:
    """A network's tensors, fp32, by name in the released files; each has its own stream of them.

    `config`: instead of the one in `NETWORKS`.
    """
    component, config_class, usual = NETWORKS[network]
    config = usual if config is None else config
    random = np.random.RandomState(zlib.crc32(component.encode()) % 0x10000)
    specs = expected_tensors(component_of(component), config_class.from_dict(config))
    shapes = {name: spec.shape for name, spec in specs.items()}
    values = {name: spread(name, (random.random_sample(shape) - 0.5) * 12**0.5) for name, shape in shapes.items()}
    dimmed = {name: _DIM_PIXELS * value for name, value in values.items() if name.startswith("decoder.conv_out.")}
    return values | dimmed


def write_network_21(folder: Path, network: str) -> Path:
    """Writes a network's tensors as one file; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{network}.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(value) for name, value in values_21(network).items()})
    return path


def write_checkpoint_21(folder: Path, sigmas: tuple[float, ...] | None = None) -> Path:
    """Writes a whole checkpoint; with `sigmas` that of Turbo. Returns its folder."""
    folders = {
        "transformer": (TINY_TRANSFORMER, ("transformer",), "diffusion_pytorch_model"),
        "vae": (TINY_VAE, ("vae",), "diffusion_pytorch_model"),
        "text_encoder": (TINY_TEXT_ENCODER, ("text_encoder", "vision"), "model"),
    }
    for name, (config, networks, stem) in folders.items():
        (folder / name).mkdir(parents=True)
        values = {n: mx.array(v) for network in networks for n, v in values_21(network, config).items()}
        mx.save_safetensors(str(folder / name / f"{stem}.safetensors"), values)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder / "processor", tokenizer_json=False)
    return write_rest_21(folder, sigmas)


GENERATIONS_21: dict[str, dict[str, Any]] = {
    "generate_21": {"size": (64, 96), "images": [], "negative": None, "cfg_scale": 1.0},
    "edit_21": {
        "size": (96, 64), "negative": "blurry", "cfg_scale": 3.0,
        "images": [image(90, 90), image(200, 120, 1, mode="RGBA")],
    },
}  # fmt: skip
"""Requests by golden file: three steps of seed 7."""
PROMPT_21 = "make <image1> blue, 让它变蓝 🦊"


def golden_inputs() -> dict[str, np.ndarray]:
    """What the networks are given, fp32 and int64.

    Noise (1, 24, 64), states (1, 20, 64), one reference's latents after the other's (1, 32, 64), VAE latents
    (1, 3, 2, 64), pixels (1, 32, 48, 4) in [-1, 1], token ids (1, 20), positions (3, 20), patches (24, 768), and what
    is added after the first layers at the image's places, (2, 6, 64).
    """
    random = np.random.RandomState(0)
    drawn = {
        "noise": random.standard_normal((1, GRID[0] * GRID[1], 64)),
        "states": 3 * random.standard_normal((1, 20, 64)),
        "references": random.standard_normal((1, sum(h * w for _, h, w in SLOTS), 64)),
        "latents": random.standard_normal((1, 3, 2, 64)),
        "pixels": random.random_sample((1, 32, 48, 4)) * 2 - 1,
        "patches": random.standard_normal((PATCHES[0] * PATCHES[1], 768)),
        "additions": random.standard_normal((2, 6, 64)),
    }
    whole = {"ids": random.randint(0, 300, (1, 20)), "positions": random.randint(0, 40, (3, 20))}
    return {name: value.astype(np.float32) for name, value in drawn.items()} | whole
