"""Writes checkpoints of random weights in the released layout: for smoke tests, bug reports and benchmarks.

The images are noise, but every file, name and shape is real, so all of the code runs without a download. Weights are
made and written shard by shard; any size fits in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import ImageProcessorConfig, SchedulerConfig, config_json
from ..models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
from ..models.qwen_image.config import TransformerConfig, VAEConfig
from ..registry import CLASSES, FOLDERS, LANGUAGE_HEAD, TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE, VISION, components_of
from ..registry import PROCESSOR as PROCESSOR_FOLDER
from ..registry import SCHEDULER as SCHEDULER_FOLDER
from ..variants import QWEN_IMAGE, VARIANTS
from .mapping import TensorSpec, expected_tensors, weights_map
from .safetensors_files import save_tensors

TINY = {
    TRANSFORMER: TransformerConfig(
        num_layers=2, num_attention_heads=3, attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=64
    ),
    TEXT_ENCODER: TextEncoderConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, rms_norm_eps=1e-6, mrope_section=(2, 3, 3),
    ),
    VISION: VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1,)
    ),
    VAE: VAEConfig(base_dim=8),
}  # fmt: skip
ROWS = components_of(QWEN_IMAGE)


def released(pipeline: str) -> dict[str, Any]:
    """The configs of the released models of a pipeline class, one of `VARIANTS`, by role."""
    rows = components_of(VARIANTS[pipeline].classes)
    return {row.role: row.released for row in rows.values() if row.role != LANGUAGE_HEAD}


FULL = released("QwenImagePipeline")  # Qwen-Image-2512
SCHEDULER = SchedulerConfig(max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02, use_dynamic_shifting=True)
LAYERED_SCHEDULER = replace(SCHEDULER, time_shift_type="linear", shift_terminal=0.0)
PROCESSOR = ImageProcessorConfig(max_pixels=28 * 28 * 16384)


def write_checkpoint(
    folder: Path,
    configs: Mapping[str, Any],
    *,
    pipeline: str = "QwenImagePipeline",
    seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a checkpoint with a byte-level tokenizer.

    Args:
        folder: where to write; made if missing.
        configs: each component's config dataclass, such as `TINY` or `FULL`.
        pipeline: its class, one of `VARIANTS`; only those that take images get the vision tower.
        seed: of the weights.
        dtype: of the weights.
        shard_bytes: maximum bytes of one file's tensors.

    Returns:
        The folder.
    """
    configs, rows = write_configs(folder, configs, pipeline=pipeline), components_of(VARIANTS[pipeline].classes)
    tensors: dict[str, list[TensorSpec]] = {}
    for component, config in configs.items():
        row = rows[component]
        tensors.setdefault(row.home, []).extend(expected_tensors(row, config).values())
    for number, (home, specs) in enumerate(tensors.items()):
        key = mx.random.key(seed * len(tensors) + number)
        _write_shards(folder / home, weights_map(rows[home].map)["stem"], specs, key, dtype, shard_bytes)
    return folder


def write_configs(folder: Path, configs: Mapping[str, Any], *, pipeline: str = "QwenImagePipeline") -> dict[str, Any]:
    """Writes all of a checkpoint but its weights, which is enough to plan its memory.

    Args:
        folder: where to write; made if missing.
        configs: each component's config dataclass, such as `TINY` or `FULL`.
        pipeline: its class, one of `VARIANTS`.

    Returns:
        The configs of the components that such a pipeline has.
    """
    variant = VARIANTS[pipeline]
    parts = {name: (CLASSES[title].library, title) for name, title in variant.classes.items()}
    _write_json(folder / "model_index.json", {"_class_name": pipeline} | parts)
    scheduler = LAYERED_SCHEDULER if variant.layered else SCHEDULER
    config = {"_class_name": variant.classes[SCHEDULER_FOLDER]} | asdict(scheduler)
    _write_json(folder / SCHEDULER_FOLDER / "scheduler_config.json", config)
    configs = dict(configs)
    if variant.layered:
        configs[TRANSFORMER] = replace(configs[TRANSFORMER], use_additional_t_cond=True, use_layer3d_rope=True)
        configs[VAE] = replace(configs[VAE], input_channels=4)
        configs[LANGUAGE_HEAD] = configs[TEXT_ENCODER]
    if not variant.takes_images:
        configs.pop(VISION, None)
    vision = {"vision_config": asdict(configs[VISION])} if VISION in configs else {}
    for home in FOLDERS:
        head, extra = ({}, vision) if home == TEXT_ENCODER else ({"_class_name": variant.classes[home]}, {})
        _write_json(folder / home / "config.json", head | config_json(configs[home]) | extra)
    if vision:
        _write_json(folder / PROCESSOR_FOLDER / "preprocessor_config.json", asdict(PROCESSOR))
    _write_tokenizer(folder / (TOKENIZER if TOKENIZER in variant.classes else PROCESSOR_FOLDER))
    return configs


def _write_shards(
    folder: Path, stem: str, specs: Iterable[TensorSpec], key: mx.array, dtype: mx.Dtype, shard_bytes: int
) -> None:
    shards = list(_shards(specs, dtype.size, shard_bytes))
    index = {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{stem}{part}.safetensors"
        keys = mx.random.split(mx.random.split(key, number)[-1], len(shard))
        tensors = {spec.name: random_values(spec, keys[n]).astype(dtype) for n, spec in enumerate(shard)}
        save_tensors(folder / name, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _shards(specs: Iterable[TensorSpec], item_bytes: int, limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        nbytes = prod(spec.shape) * item_bytes
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += nbytes
    yield shard


def random_values(spec: TensorSpec, key: mx.array) -> mx.array:
    """Values that keep activations of order one: matrices scaled by their inputs, norms around 1, small biases."""
    noise = mx.random.normal(spec.shape, key=key)
    if len(spec.shape) > 1 and not spec.name.endswith("gamma"):
        return noise / prod(spec.shape[1:]) ** 0.5
    return 0.1 * noise if spec.name.endswith("bias") else 1 + 0.1 * noise


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, by GPT-2's printable stand-ins for bytes, and the special tokens after them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    _write_json(folder / "vocab.json", {letter: n for n, letter in enumerate(letters)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(folder / "added_tokens.json", {token: len(letters) + n for n, token in enumerate(special)})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
