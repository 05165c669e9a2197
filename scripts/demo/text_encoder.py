"""The demo's text encoder: a tiny Qwen2.5-VL, drawn by lot and never trained.

Its states keep every word apart, which is all that a transformer needs to learn what the words mean.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

import mlx.core as mx

from qwen_image_mlx.config import ImageProcessorConfig
from qwen_image_mlx.models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.weights.mapping import TensorSpec, expected_tensors
from qwen_image_mlx.weights.synthetic import ROWS

LANGUAGE = TextEncoderConfig(
    hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=960, rms_norm_eps=1e-6, mrope_section=(4, 6, 6),
)  # fmt: skip
VISION = VisionConfig(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=128, fullatt_block_indexes=(1,)
)
# Every image is seen at 56x56 pixels, whatever a pipeline shows it at: four features, and an encoder's quick work.
PROCESSOR = ImageProcessorConfig(min_pixels=56 * 56, max_pixels=56 * 56)
SUBLAYER_GAIN = 0.5  # of what attention and MLP add to a token


def write_text_encoder(folder: Path, special: Mapping[str, int], seed: int = 0) -> None:
    """Writes `text_encoder/` and `processor/`.

    Args:
        folder: of the model.
        special: ids of the tokenizer's special tokens.
        seed: of the weights.
    """
    specs = expected_tensors(ROWS["text_encoder"], LANGUAGE) | expected_tensors(ROWS["vision"], VISION)
    tensors = {name: _values(spec, seed).astype(mx.bfloat16) for name, spec in specs.items()}
    for name in ("text_encoder", "processor"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "text_encoder" / "model.safetensors"), tensors, {"format": "pt"})
    _write_json(folder / "text_encoder" / "config.json", _config(special))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": VISION.patch_size,
        "temporal_patch_size": VISION.temporal_patch_size,
        "merge_size": VISION.spatial_merge_size,
    }
    _write_json(folder / "processor" / "preprocessor_config.json", processor | asdict(PROCESSOR))


def _values(spec: TensorSpec, seed: int) -> mx.array:
    """Values that let a word's own embedding outweigh what its neighbours add; each tensor has its own draws."""
    noise = mx.random.normal(spec.shape, key=mx.random.key(zlib.crc32(f"{seed} {spec.name}".encode())))
    if spec.name.endswith("bias"):
        return 0.1 * noise
    if len(spec.shape) == 1:
        return mx.ones(spec.shape)
    if "embed_tokens" in spec.name:
        return noise
    gain = SUBLAYER_GAIN if spec.name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
    return gain * noise / prod(spec.shape[1:]) ** 0.5


def _config(special: Mapping[str, int]) -> dict:
    language, vision = asdict(LANGUAGE), asdict(VISION)
    section = language.pop("mrope_section")
    vision |= {"model_type": "qwen2_5_vl", "hidden_act": "silu", "in_chans": VISION.in_channels,
               "spatial_patch_size": VISION.patch_size, "tokens_per_second": 2}  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **language,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "max_window_layers": LANGUAGE.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "vision_token_id": special["<|vision_pad|>"],
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_config": vision,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
