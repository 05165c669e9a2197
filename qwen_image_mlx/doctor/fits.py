"""The memory limits, and the quantizations of a model of each generation that fit, by the pipeline's own plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..pipeline.limits import memory_size, usable_memory
from ..pipeline.pipeline import QwenImagePipeline
from ..runtime.memory_plan import MemoryPlan, Work
from ..runtime.session import Session
from ..weights.schemes import NONE, Quantization
from ..weights.synthetic import FULL, released, write_configs
from .measure import on_metal
from .outcome import Outcome

_FORMS = {"bf16": NONE, "8 bits": "8", "4 bits": "4"}


class Model(NamedTuple):
    """A released model, and the image that is planned.

    Attributes:
        name: what people call it.
        pipeline: its class.
        side: of its own square, in pixels.
        guided: whether it is guided by default.
        figure: the name of its plans in the report.
    """

    name: str
    pipeline: str
    side: int
    guided: bool
    figure: str


MODELS = (
    Model("Qwen-Image-2512", "QwenImagePipeline", 1328, True, "plans"),
    Model("Qwen-Image-2.1", "QwenImage21Pipeline", 2048, False, "plans_21"),
)


def run(options: Mapping[str, Any]) -> Outcome:
    """Plans an image with the configs of each released model, which need no weights."""
    outcome, budget = Outcome(), usable_memory()
    plans = {model.figure: plan(model, Path(options["folder"]) / model.figure, budget) for model in MODELS}
    outcome.figures = {"memory_bytes": memory_size(), "usable_bytes": budget, **plans}
    largest = max(largest_buffers().values())
    outcome.figures |= {"largest_buffer_needed_bytes": largest}
    allowed = mx.device_info().get("max_buffer_length") if on_metal() else None
    if allowed is not None and largest > int(allowed):
        outcome.find(
            "odd",
            f"one buffer may hold {int(allowed) / 1e9:.1f} GB, but models take {largest / 1e9:.1f}",
        )
    outcome.summary = f"{budget / 1e9:.1f} GB may be used"
    for model in MODELS:
        forms = "; ".join(f"{form} {found['fits']}" for form, found in plans[model.figure].items())
        outcome.summary += f"; {model.name} at {model.side}x{model.side}, as planned: {forms}"
    return outcome


def plan(model: Model, folder: Path, budget: int) -> dict[str, dict[str, Any]]:
    """For each form what fits a budget in bytes, and every plan's peak.

    Args:
        model: a row of the table.
        folder: where to write its configs.
        budget: bytes that may be used.
    """
    plans, work = {}, Work(width=model.side, height=model.side, guided=model.guided)
    write_configs(folder, released(model.pipeline), pipeline=model.pipeline)
    for form, quantize in _FORMS.items():
        pipeline = QwenImagePipeline.from_pretrained(folder, quantize=Quantization.parse(quantize))
        made = Session(pipeline, {"memory": "auto"}).alternatives(work)
        peaks = {f"{one.residency.name.replace(', ', ' ')}_bytes": one.peak for one in made}
        plans[form] = {"fits": fitting(made, budget), **peaks}
    return plans


def fitting(plans: Sequence[MemoryPlan], budget: int) -> str:
    """The first residency that fits a budget in bytes, or else the first that would once saved quantized."""
    for plan in plans:
        if plan.fits(budget):
            return plan.residency.name
    saved = (f"{plan.residency.name} once saved quantized" for plan in plans if plan.peak <= budget)
    return next(saved, "too large")


def largest_buffers() -> dict[str, int]:
    """The largest arrays in bytes: the text encoder's embedding in bf16, and a decoder's activations at 2048x2048."""
    text, vae = FULL["text_encoder"], FULL["vae"]
    return {
        "embedding": 2 * text.vocab_size * text.hidden_size,
        "activations": 4 * 2048**2 * vae.base_dim,
    }
