"""Qwen-Image-2.1 by the reference libraries: tiny models of the real classes, and runs of the pipeline.

Like `reference.py`, made with torch, diffusers and transformers alone. Qwen3VLProcessor wants torchvision, so
a stand-in does its work with transformers' own PIL image processor and tokenizer.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import REAL_CONFIGS, Config, write_tokenizer
from checkpoints_21 import REAL_TEXT_ENCODER, TINY_PROCESSOR
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from reference import _filled as filled
from reference import to_numpy
from transformers import BatchFeature, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"


def make_transformer_21(config: Config, *, seed: int = 0) -> QwenImage21Transformer2DModel:
    """The reference's transformer of that config.json, with seeded values everywhere."""
    return filled(QwenImage21Transformer2DModel.from_config(deepcopy(config)), seed, "transformer")


@torch.no_grad()
def make_vae_21(config: Config, *, seed: int = 0) -> AutoencoderKLQwenImage21:
    """The reference's VAE of that config.json, with seeded values everywhere; few pixels of noise are out of range."""
    model = filled(AutoencoderKLQwenImage21.from_config(deepcopy(config)), seed, "vae")
    noise = torch.randn(1, model.config.z_dim, 1, 6, 6, generator=torch.Generator("cpu").manual_seed(0))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    last = model.decoder.conv_out
    last.weight.mul_(1e-3)
    last.bias.mul_(1e-3)
    pixels = model.decode(noise * std + mean).sample
    gain = 0.3 / pixels.std()
    last.weight.mul_(gain)
    last.bias.mul_(gain).sub_(pixels.mean() * gain)
    return model


def make_text_encoder_21(config: Config, *, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The reference's text encoder of that config.json, with seeded fp32 values everywhere."""
    fp32 = deepcopy(config) | {"dtype": "float32"}
    return filled(Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(fp32)), seed, "text_encoder")


class Processor21:
    """What Qwen3VLProcessor does, without torchvision."""

    def __init__(self, tokenizer: Any, config: Config):
        self.tokenizer = tokenizer
        limits = {"shortest_edge": config["min_pixels"], "longest_edge": config["max_pixels"]}
        self.image_processor = Qwen2VLImageProcessorPil(
            size=limits, patch_size=config["patch_size"], image_mean=config["image_mean"], image_std=config["image_std"]
        )

    def apply_chat_template(self, messages: Any, tokenize: bool, return_dict: bool) -> list[list[int]]:
        (message,) = messages
        text = f"<|im_start|>{message['role']}\n{message['content'][0]['text']}<|im_end|>\n"
        return [self.tokenizer(text)["input_ids"]]

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> BatchFeature:
        prepared: dict[str, Any] = {}
        if images is not None:
            prepared = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((prepared["image_grid_thw"].prod(dim=1) // 4).tolist())
            lines = []
            for line in text:
                head, *tails = line.split(IMAGE_TOKEN)
                lines.append(head + "".join(IMAGE_TOKEN * next(counts) + tail for tail in tails))
            text = lines
        tokens = dict(self.tokenizer(text, **options))
        tokens["mm_token_type_ids"] = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
        return BatchFeature({**tokens, **prepared})


def make_pipeline_21(
    folder: Path, *, transformer: Any, vae: Any, text_encoder: Any, sample_sigmas: list[float] | None = None
) -> QwenImage21Pipeline:
    """The reference's pipeline around models, with the real tokenizer, which it writes into the folder."""
    path = write_tokenizer(folder, tokenizer_json=True) / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<|endoftext|>")
    scheduler = dict(REAL_CONFIGS["scheduler"])
    if sample_sigmas is not None:
        scheduler |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler),
        vae=vae,
        text_encoder=text_encoder,
        processor=Processor21(tokenizer, TINY_PROCESSOR),
        transformer=transformer,
        sample_sigmas=sample_sigmas,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def run_pipeline_21(
    pipe: QwenImage21Pipeline, *, seed: int, **request: Any
) -> tuple[list[np.ndarray], list[Image.Image]]:
    """Latents after every step, packed and fp32, and the images."""
    latents: list[np.ndarray] = []

    def keep(_pipe: Any, _step: int, _time: torch.Tensor, state: Config) -> Config:
        latents.append(to_numpy(state["latents"]))
        return {}

    output = pipe(**request, generator=torch.Generator("cpu").manual_seed(seed), callback_on_step_end=keep)
    return latents, output.images


@functools.cache
def full_size_meta_21(component: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a full-size "transformer", "vae" or "text_encoder"; no memory is allocated."""
    with torch.device("meta"):
        if component == "transformer":
            model: Any = QwenImage21Transformer2DModel()
        elif component == "vae":
            model = AutoencoderKLQwenImage21()
        else:
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(deepcopy(REAL_TEXT_ENCODER)))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
