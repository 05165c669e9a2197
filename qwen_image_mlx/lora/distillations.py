"""Distilled LoRAs: how they are recognized and sampled, and the official Lightning one of each released model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..models.qwen_image_21 import facts as qwen_image_21
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
            (generate_with_diffusers.py of ModelTC/Qwen-Image-Lightning). None keeps the checkpoint's own shift.
        stretch: whether the noise levels are then stretched to the checkpoint's shift_terminal.
        levels: unshifted noise levels, by number of steps; other numbers have a uniform grid.
        other_shift: the shift of that grid, where it differs.
        name: how its family is known in file names, a regular expression.
        evidence: how it was recognized, for messages: "its name", "its metadata" or "its rank and alpha".
    """

    steps: int = 0
    cfg_scale: float = 1.0
    shift: float | None = 3.0
    stretch: bool = True
    levels: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    other_shift: float | None = None
    name: str = "lightning"
    evidence: str = ""

    def at(self, steps: int | None) -> Distillation:
        """The same for another number of steps; None keeps its own."""
        return self if steps is None else replace(self, steps=steps)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The unshifted noise levels of its number of steps; None is a uniform grid."""
        return self.levels.get(self.steps)

    @property
    def static_shift(self) -> float | None:
        """The shift for its number of steps; None is the checkpoint's own."""
        return self.shift if self.sigmas or self.other_shift is None else self.other_shift

    @property
    def schedule(self) -> str:
        """Its schedule in words."""
        grid = f"its own {self.steps} noise levels, " if self.sigmas else ""
        if self.static_shift is None:
            return f"{grid}the model's own shift{'' if self.stretch else ' and no terminal stretch'}"
        return grid + ("unshifted" if grid and self.static_shift == 1 else f"a static shift of {self.static_shift:g}")


# The families, and what a file of each is sampled with if its name does not say the steps (0: it has to). Sources:
# - Lightning: `Distillation.shift`.
# - Viggle's turbo LoRAs of Qwen-Image-2.1: its card and scheduler_config.json (the model's shift by size,
#   shift_terminal null); the nodes of v0.2.1 for 6 and 8 steps, of v0.1 for 4, of v0.2 for 5.
# - Pruna's LoRAs of Qwen-Image-2.1 (p_qwen_image_2.1_8step_v0.1): the levels of its card, used as they stand. Those of
#   8 steps are a uniform grid shifted by 2, which is what other numbers of steps take.
# - DMD2 (MusePublic/Qwen-Image-Distill, qwen_image_distill_3step) and DiffSynth's Qwen-Image-Distill, as LoRA and as a
#   whole model: examples/qwen_image/model_inference of modelscope/DiffSynth-Studio (3 steps with an exponential shift
#   of log 2.5, which is a static one of 2.5; 15 steps with the model's own; no guidance).
# - Rapid-AIO (Phr00t): its card (4 to 8 steps, no guidance); Lightning LoRAs are merged into it, so their shift.
# - The difference of 2.1-Turbo and 2.1 as a LoRA (qwen_image_2.1_turbo_lora_avg_rank_178): Turbo's saved levels.
FAMILIES: tuple[Distillation, ...] = (
    Distillation(),
    Distillation(
        name="viggle",
        steps=6,
        shift=None,
        stretch=False,
        levels={
            4: (1.0, 0.75, 0.5, 0.25),
            5: (1.0, 0.875, 0.75, 0.5, 0.25),
            6: (1.0, 0.9375, 0.875, 0.75, 0.5, 0.25),
            8: (1.0, 0.9375, 0.875, 0.75, 0.625, 0.5, 0.25, 0.125),
        },
    ),
    Distillation(
        name=r"\bp_q(wen)?_image_2[._]1|pruna",
        shift=1.0,
        levels={
            5: (1.0, 0.94, 6 / 7, 2 / 3, 0.4),
            8: (1.0, 14 / 15, 6 / 7, 10 / 13, 2 / 3, 6 / 11, 0.4, 2 / 9),
        },
        other_shift=2.0,
    ),
    Distillation(name=r"qwen[-_]image[-_]distill.*(dmd2|3[-_ ]?step)", steps=3, shift=2.5),
    Distillation(name=r"qwen[-_]image[-_]distill", steps=15, shift=None),
    Distillation(name=r"rapid[-_]?aio", steps=4),
    Distillation(
        name=r"2[._]1_turbo_lora",
        steps=len(qwen_image_21.TURBO_SIGMAS),
        shift=1.0,
        levels={len(qwen_image_21.TURBO_SIGMAS): qwen_image_21.TURBO_SIGMAS},
    ),
)

_STEPS_PATTERN = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?step", re.IGNORECASE)
_NAMELESS = ("model", "pytorch_lora_weights", "adapter_model")
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
    """The sampling a distilled LoRA was trained for, by its file name, its metadata, or its rank, alpha and targets.

    Source of the shape: rank 64 and alpha 8 of lightx2v/Qwen-Image-2512-Lightning (sgl-project/sglang#17086) and
    Qwen-Image-Edit-2511-Lightning (modelscope/DiffSynth-Studio#1241).
    """
    texts = [("its name", lora.path.stem)]
    texts += [("its metadata", lora.metadata[key]) for key in _NAMING_METADATA if key in lora.metadata]
    if lora.path.stem in _NAMELESS:  # a file of the hub, which its repository names
        texts.append(("its folder's name", "/".join(lora.path.parts[-4:-1])))
    for evidence, text in texts:
        if found := named_distillation(text, evidence):
            return found
    return Distillation(_STEPS_BY_SHAPE, evidence="its rank and alpha") if _has_lightning_shape(lora) else None


def named_distillation(text: str, evidence: str = "its name") -> Distillation | None:
    """The sampling that a name, of a LoRA or of a whole model, stands for; None for one of no family."""
    text = text[:_MAX_TITLE]
    match = _STEPS_PATTERN.search(text)
    for family in FAMILIES:
        if not re.search(family.name, text, re.IGNORECASE):
            continue
        if 0 < (steps := int(match[1]) if match else family.steps) <= _MAX_STEPS:
            return replace(family, steps=steps, evidence=evidence)
    return None


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
