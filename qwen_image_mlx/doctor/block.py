"""Time and memory of transformer blocks in a chain, as the pipeline runs them, against the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..gpu import finish
from ..models import nn
from ..models.qwen_image.config import TransformerConfig
from ..pipeline.limits import limits
from ..runtime.memory_plan import Work
from ..weights.synthetic import FULL
from .measure import judge_memory, on_gpu, peak_of, plan_bytes
from .outcome import Outcome, amount
from .parts import block_inputs, chain, chained_block

_BLOCKS, _CPU_BLOCKS = 6, 3
_SIDE, _CPU_SIDE = 64, 14  # of the image, in tokens
_TEXT, _CPU_TEXT = 200, 32
_CACHES = {"cache_1gib": 1 << 30, "cache_none": 0}


def run(options: Mapping[str, Any]) -> Outcome:
    """Runs the chain once to warm up, then plain, guided, and with other cache limits."""
    outcome, config = Outcome(), width()
    block = chained_block(config)
    side, text = (_SIDE, _TEXT) if on_gpu() else (_CPU_SIDE, _CPU_TEXT)
    inputs = block_inputs(text, [(side, side)], mx.bfloat16, config)
    finish(inputs)
    work = Work(width=16 * side, height=16 * side, text_tokens=text, steps=1, guided=False)
    plans = {
        name: plan_bytes(Path(options["folder"]) / name, "denoise", replace(work, guided=name == "guided"), config)
        for name in ("plain", "guided")
    }
    with limits():
        chain(block, inputs, 2)
        outcome.figures["plain"] = _measure(block, inputs, 1, plans["plain"])
        outcome.figures["guided"] = _measure(block, inputs, 2, plans["guided"])
    for name, cache in _CACHES.items():
        with _cache_limit(cache):
            chain(block, inputs, 2)
            outcome.figures[name] = {"block_s": _measure(block, inputs, 1, plans["plain"])["block_s"]}
    judge_memory(outcome, {name: outcome.figures[name] for name in plans})
    plain = outcome.figures["plain"]
    outcome.summary = (
        f"a block of {side * side} + {text} tokens and {config.dim} channels takes {plain['block_s']:.3g} s and "
        f"{amount(plain['peak_bytes'])} in addition to its weights, {plain['plan_ratio']:.2f} of the plan"
    )
    return outcome


def width() -> TransformerConfig:
    """The released transformer's config; on a CPU with 3 heads instead of 24."""
    return FULL["transformer"] if on_gpu() else replace(FULL["transformer"], num_attention_heads=3)


def _measure(block: nn.Module, inputs: Any, branches: int, plan: int) -> dict[str, float]:
    count, seconds = _BLOCKS if on_gpu() else _CPU_BLOCKS, []
    peak = peak_of(lambda: seconds.append(chain(block, inputs, count, branches)))
    return {
        "block_s": seconds[0] / count,
        "peak_bytes": peak,
        "plan_bytes": plan,
        "plan_ratio": peak / plan,
        "peak_units": peak / sum(x.nbytes for x in (*inputs[0], inputs[1])),
    }


@contextmanager
def _cache_limit(nbytes: int) -> Iterator[None]:
    before = mx.set_cache_limit(nbytes)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
