"""The memory limits, and the quantizations of Qwen-Image-2512 that fit, by the pipeline's own plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..pipeline.limits import memory_size, usable_memory
from ..pipeline.pipeline import QwenImagePipeline
from ..runtime.memory_plan import MemoryPlan, Work
from ..runtime.session import Session
from ..weights.schemes import NONE, Quantization
from ..weights.synthetic import FULL, write_configs
from .measure import on_metal
from .outcome import Outcome

SIDE = 1328  # the model's own square
_FORMS = {"bf16": NONE, "8 bits": "8", "4 bits": "4"}


def run(options: Mapping[str, Any]) -> Outcome:
    """Plans a guided image with the configs of the released model, which need no weights."""
    outcome, budget = Outcome(), usable_memory()
    folder, work = Path(options["folder"]) / "configs", Work(width=SIDE, height=SIDE)
    write_configs(folder, FULL)
    plans: dict[str, Any] = {}
    for name, quantize in _FORMS.items():
        pipeline = QwenImagePipeline.from_pretrained(folder, quantize=Quantization.parse(quantize))
        made = Session(pipeline, {"memory": "auto"}).alternatives(work)
        peaks = {f"{plan.residency.name.replace(', ', ' ')}_bytes": plan.peak for plan in made}
        plans[name] = {"fits": fitting(made, budget), **peaks}
    outcome.figures = {"memory_bytes": memory_size(), "usable_bytes": budget, "plans": plans}
    largest = max(largest_buffers().values())
    outcome.figures |= {"largest_buffer_needed_bytes": largest}
    allowed = mx.device_info().get("max_buffer_length") if on_metal() else None
    if allowed is not None and largest > int(allowed):
        outcome.find(
            "odd",
            f"one buffer may hold {int(allowed) / 1e9:.1f} GB, but models take {largest / 1e9:.1f}",
        )
    forms = "; ".join(f"{name} {plan['fits']}" for name, plan in plans.items())
    outcome.summary = f"{budget / 1e9:.1f} GB may be used; Qwen-Image-2512 at {SIDE}x{SIDE}, as planned: {forms}"
    return outcome


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
