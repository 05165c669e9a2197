"""Distilled ("Lightning") LoRAs: how they are recognized and sampled, and the official one of each released model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .file import SUFFIX, LoRA


@dataclass(frozen=True)
class Distillation:
    """How a distilled LoRA is sampled.

    Attributes:
        steps: denoising steps.
        cfg_scale: guidance; 1 is none.
        shift: of the schedule, the same for every size: sigma' = shift sigma / (1 + (shift - 1) sigma), then no
            terminal stretch. In the scheduler's words that is use_dynamic_shifting false, shift 3, shift_terminal
            none (`sampling.schedule.static_shift`). The reference spells the same sigmas as base_shift = max_shift =
            ln 3, shift 1, shift_terminal none, use_dynamic_shifting true, time_shift_type exponential
            (generate_with_diffusers.py of ModelTC/Qwen-Image-Lightning).
        evidence: how it was recognized, for messages: "its name", "its metadata" or "its rank and alpha".
    """

    steps: int
    cfg_scale: float = 1.0
    shift: float = 3.0
    evidence: str = ""


_STEPS_PATTERN = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?step", re.IGNORECASE)
_MAX_TITLE = 500  # characters
_MAX_STEPS = 16  # more is not a distillation: "lightning" is also weather, and "steps" also training
_NAMING_METADATA = ("ss_output_name", "modelspec.title", "name", "title")

# All official files have the size that rank 64 and an alpha for each of these twelve matrices of a block give.
_RANK, _SCALE = 64, 8 / 64
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_BLOCK = frozenset(
    [*(f"attn.{name}" for name in _ATTENTION)]
    + [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
)
# 4-step and 8-step files have the same shape; too many steps cost time, too few cost quality.
_STEPS_BY_SHAPE = 8


def distillation_of(lora: LoRA) -> Distillation | None:
    """The sampling a Lightning LoRA was trained for, by its file name, its metadata, or its rank, alpha and targets.

    Source of the shape: rank 64 and alpha 8 of lightx2v/Qwen-Image-2512-Lightning (sgl-project/sglang#17086) and
    Qwen-Image-Edit-2511-Lightning (modelscope/DiffSynth-Studio#1241).
    """
    texts = [("its name", lora.path.stem)]
    texts += [("its metadata", lora.metadata[key]) for key in _NAMING_METADATA if key in lora.metadata]
    for evidence, text in texts:
        text = text[:_MAX_TITLE]
        if "lightning" not in text.lower():
            continue
        if (match := _STEPS_PATTERN.search(text)) and 0 < (steps := int(match[1])) <= _MAX_STEPS:
            return Distillation(steps, evidence=evidence)
    return Distillation(_STEPS_BY_SHAPE, evidence="its rank and alpha") if _has_lightning_shape(lora) else None


def _has_lightning_shape(lora: LoRA) -> bool:
    layers = Counter()
    for target, update in lora.updates.items():
        head, _, layer = target.partition(".")
        number, _, layer = layer.partition(".")
        if head != "transformer_blocks" or not number.isdigit() or layer not in _BLOCK:
            return False
        if update.kind != "LoRA" or (update.rank, update.scale) != (_RANK, _SCALE):
            return False
        layers[layer] += 1
    return layers.keys() == _BLOCK and len(set(layers.values())) == 1


def _official(repo: str, stem: str, version: str) -> dict[int, str]:
    return {steps: f"lightx2v/{repo}:{stem}-Lightning-{steps}steps-{version}{SUFFIX}" for steps in (4, 8)}


# The newest official file of each released model, by steps. Qwen-Image-Layered has none.
# Sources: ModelTC/Qwen-Image-Lightning's README (Qwen-Image, Edit, 2509) and the hub's listings of the repositories.
LIGHTNING: dict[str, dict[int, str]] = {
    "Qwen/Qwen-Image": _official("Qwen-Image-Lightning", "Qwen-Image", "V2.0-bf16"),
    "Qwen/Qwen-Image-2512": _official("Qwen-Image-2512-Lightning", "Qwen-Image-2512", "V1.0-bf16"),
    "Qwen/Qwen-Image-Edit": _official("Qwen-Image-Lightning", "Qwen-Image-Edit", "V1.0-bf16"),
    "Qwen/Qwen-Image-Edit-2509": _official(
        "Qwen-Image-Lightning", "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509", "V1.0-bf16"
    ),
    "Qwen/Qwen-Image-Edit-2511": _official("Qwen-Image-Edit-2511-Lightning", "Qwen-Image-Edit-2511", "V1.0-bf16"),
}
