"""Time and memory of transformer blocks in a chain, as the pipeline runs them, against the memory plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import TransformerConfig
from ..gpu import Pace, finish
from ..models.transformer import TransformerBlock
from ..pipeline.limits import limits
from ..pipeline.pipeline import QwenImagePipeline
from ..runtime.memory import MemoryPlan, Work, make_plan
from ..weights.synthetic import FULL, write_configs
from .measure import on_gpu
from .outcome import Outcome, amount
from .parts import block_inputs, transformer_block
from .values import fill

_BLOCKS, _CPU_BLOCKS = 6, 3
_SIDE, _CPU_SIDE = 64, 14  # of the picture, in tokens
_TEXT, _CPU_TEXT = 200, 32
_TOO_LOW = 1.2  # largest ratio of what is measured to what is planned
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
        name: planned(Path(options["folder"]) / name, "denoise", replace(work, guided=name == "guided"), config)
        for name in ("plain", "guided")
    }
    with limits():
        chain(block, inputs, 2)
        outcome.figures["plain"] = _measured(block, inputs, 1, plans["plain"])
        outcome.figures["guided"] = _measured(block, inputs, 2, plans["guided"])
    for name, cache in _CACHES.items():
        with _cache_limit(cache):
            chain(block, inputs, 2)
            outcome.figures[name] = {"block_s": _measured(block, inputs, 1, plans["plain"])["block_s"]}
    judge_memory(outcome, {name: outcome.figures[name] for name in plans})
    plain = outcome.figures["plain"]
    outcome.summary = (
        f"a block of {side * side} + {text} tokens and {config.dim} channels takes {plain['block_s']:.3g} s and "
        f"{amount(plain['peak_bytes'])} beside its weights, {plain['plan_ratio']:.2f} of the plan"
    )
    return outcome


def width() -> TransformerConfig:
    """The released transformer's config; on a CPU with 3 heads instead of 24."""
    return FULL["transformer"] if on_gpu() else replace(FULL["transformer"], num_attention_heads=3)


def chained_block(config: TransformerConfig) -> nn.Module:
    """A block in bf16."""
    if config == FULL["transformer"]:
        block = transformer_block()
    else:
        block = fill(TransformerBlock(config, False), "narrow")
    block.set_dtype(mx.bfloat16)
    mx.eval(block.parameters())
    mx.clear_cache()
    return block


def chain(
    block: nn.Module, inputs: Any, count: int, branches: int = 1, on_layer: Callable[[int], None] = lambda count: None
) -> float:
    """Runs a block on its own output as often as is asked, for each branch; returns the seconds that took."""
    images, text, rows, rotary = inputs
    streams, pace, start = [(images, text)] * branches, Pace(on_layer), time.perf_counter()
    for _ in range(count):
        streams = [block(images, text, rows, rotary) for images, text in streams]
        pace([x for images, text in streams for x in (*images, text)])
    finish(streams)
    return time.perf_counter() - start


def planned(
    folder: Path, stage: str, work: Work, transformer: TransformerConfig = FULL["transformer"], **others: Any
) -> int:
    """Bytes that the plan says a stage takes beside what is resident.

    Args:
        folder: for configs.
        stage: "denoise" or "decode".
        work: what is to be made.
        transformer, others: configs instead of the released ones.
    """
    write_configs(folder, {**FULL, "transformer": transformer, **others})
    strip = work.width * work.height
    plan: MemoryPlan = make_plan(QwenImagePipeline.from_pretrained(folder).components, work, strip_pixels=strip)
    (found,) = (each for each in plan.stages if each.name == stage)
    return found.peak - found.resident


def peak_of(fn: Callable[[], Any]) -> int:
    """Bytes beside what there was before, at the most, while something runs."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fn()
    return mx.get_peak_memory() - before


def judge_memory(outcome: Outcome, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Finds where the plan is too low: figures with `peak_bytes`, `plan_bytes` and `plan_ratio`, by name."""
    for name, figures in measured.items():
        if figures["plan_ratio"] > _TOO_LOW:
            outcome.find(
                "odd",
                f"{name} takes {amount(figures['peak_bytes'])}, but the memory plan says "
                f"{amount(figures['plan_bytes'])}; give --memory less than you have, and report this",
            )


def _measured(block: nn.Module, inputs: Any, branches: int, plan: int) -> dict[str, float]:
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
