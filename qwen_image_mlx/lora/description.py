"""What can be said of a LoRA that was read: a description for people, and how a distilled one is sampled.

Distilled ("Lightning") LoRAs are known by name, metadata or shape; the official one of each released model is listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import some
from ..outside import one_line
from .file import SUFFIX, LoRA, Update

_METADATA_SHOWN = (
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.architecture", "modelspec.trigger_phrase",
    "modelspec.usage_hint", "ss_output_name", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "name", "title", "version", "software", "base_model",
)  # fmt: skip
_MOST_CHARACTERS = 200


@dataclass(frozen=True)
class Profile:
    """How a distilled LoRA is sampled.

    Attributes:
        steps: denoising steps.
        cfg_scale: guidance; 1 is none.
        shift: of the schedule, the same for every size: sigma' = shift sigma / (1 + (shift - 1) sigma), then no
            terminal stretch. In the scheduler's words that is use_dynamic_shifting false, shift 3, shift_terminal
            none (`sampling.schedule.static_shift`). The reference spells the same sigmas as base_shift = max_shift =
            ln 3, shift 1, shift_terminal none, use_dynamic_shifting true, time_shift_type exponential
            (generate_with_diffusers.py of ModelTC/Qwen-Image-Lightning).
        evidence: what gave it away, to be shown: "its name", "its metadata" or "its rank and alpha".
    """

    steps: int
    cfg_scale: float = 1.0
    shift: float = 3.0
    evidence: str = ""


_STEPS_SAID = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?step", re.IGNORECASE)
_TITLE = 500  # characters that a title may have
_MOST_STEPS = 16  # more is no distillation: "lightning" is also weather, and "steps" also training
_NAMING_METADATA = ("ss_output_name", "modelspec.title", "name", "title")

# All official files have the size that rank 64 and an alpha for each of these twelve matrices of a block give.
_RANK, _SCALE = 64, 8 / 64
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_BLOCK = frozenset(
    [*(f"attn.{name}" for name in _ATTENTION)]
    + [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
)
# The shape does not tell a 4-step file from an 8-step one; too many steps cost time, too few the picture.
_STEPS_BY_SHAPE = 8


def distilled_profile(lora: LoRA) -> Profile | None:
    """The sampling a Lightning LoRA was trained for, by its file name, its metadata, or its rank, alpha and targets.

    Source of the shape: rank 64 and alpha 8 of lightx2v/Qwen-Image-2512-Lightning (sgl-project/sglang#17086) and
    Qwen-Image-Edit-2511-Lightning (modelscope/DiffSynth-Studio#1241).
    """
    texts = [("its name", lora.path.stem)]
    texts += [("its metadata", lora.metadata[key]) for key in _NAMING_METADATA if key in lora.metadata]
    for evidence, text in texts:
        text = text[:_TITLE]
        if "lightning" not in text.lower():
            continue
        if (match := _STEPS_SAID.search(text)) and 0 < (steps := int(match[1])) <= _MOST_STEPS:
            return Profile(steps, evidence=evidence)
    return Profile(_STEPS_BY_SHAPE, evidence="its rank and alpha") if _has_lightning_shape(lora) else None


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


# The newest official file of each released model, by steps. There is none for Qwen-Image-Layered.
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


def describe(lora: LoRA) -> list[tuple[str, str]]:
    """What a LoRA is, as (label, text) for people; nothing of it is read but what `read_lora` has read."""
    updates = lora.updates.values()
    profile = distilled_profile(lora)
    kinds = Counter(_kind_names(updates))
    ranks = Counter(str(update.rank) for update in updates if update.rank)
    scales = Counter(f"{update.scale:g}" for update in updates if update.kind)
    groups = Counter(_group(update.target) for update in updates)
    dtypes = Counter(tensor.dtype for update in updates for tensor in update.tensors.values())
    source = "PEFT settings" if lora.peft else "alpha tensors" if _has_alphas(lora) else "no alpha in the file"
    rows = [
        ("file", str(lora.path)),
        ("bytes", str(lora.nbytes)),
        ("dialect", ", ".join(lora.dialects)),
        ("kinds", _counted(kinds)),
        ("strength", f"{lora.strength:g}" if lora.strength != 1 else ""),
        ("targets", f"{lora.matched} of {lora.total}"),
        ("rank", _counted(ranks)),
        ("alpha / rank", f"{_counted(scales)} ({source})" if scales else ""),
        ("changes", _counted(groups)),
        ("dtype", _counted(dtypes)),
        ("unmatched", f"{len(lora.unmatched)}: {some(lora.unmatched)}" if lora.unmatched else ""),
        ("profile", f"{profile.steps} steps, cfg {profile.cfg_scale:g}, by {profile.evidence}" if profile else ""),
    ]
    said = ((key, lora.metadata[key]) for key in _METADATA_SHOWN if key in lora.metadata)
    rows += [(f"metadata {key}", one_line(text, _MOST_CHARACTERS)) for key, text in said]
    return [(label, text) for label, text in rows if text]


def _kind_names(updates: Iterable[Update]) -> Iterable[str]:
    for update in updates:
        if update.kind:
            yield f"{update.kind} with magnitudes (DoRA)" if update.is_dora else update.kind
        for role, name in (("difference", "difference"), ("replacement", "replacement")):
            if role in update.tensors:
                yield name
        if update.changes_bias:
            yield "bias"


def _has_alphas(lora: LoRA) -> bool:
    return any("alpha" in update.tensors for update in lora.updates.values())


def _group(target: str) -> str:
    """The target with its block's number taken out."""
    return ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(target.split(".")))


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())
