"""Time and memory of decoding an image, against the memory plan; on Apple's GPU with and without Winograd."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..gpu import finish
from ..models.qwen_image.vae import Decoder
from ..pipeline.autoencode import decode
from ..pipeline.limits import limits
from ..runtime.memory_plan import Work
from ..weights.synthetic import FULL
from .measure import judge_memory, on_gpu, on_metal, peak_of, plan_bytes
from .outcome import Outcome, amount
from .values import array, fill

_SIDE, _CPU_SIDE = 512, 128
_CPU_BASE = 24  # channels on a CPU instead of 96
_WINOGRAD = "MLX_CONV_WINOGRAD"  # MLX reads it at every convolution


def run(options: Mapping[str, Any]) -> Outcome:
    """Decodes a square in one strip."""
    outcome, config = Outcome(), FULL["vae"] if on_gpu() else replace(FULL["vae"], base_dim=_CPU_BASE)
    side = _SIDE if on_gpu() else _CPU_SIDE
    decoder = fill(Decoder(config), f"decoder.{config.base_dim}")
    latents = array("latents", (1, side // 8, side // 8, config.z_dim), mx.float32)
    finish(decoder.parameters(), latents)
    plan = plan_bytes(Path(options["folder"]) / "configs", "decode", Work(width=side, height=side), vae=config)

    def measure() -> dict[str, float]:
        seconds: list[float] = []

        def once() -> None:
            start = time.perf_counter()
            finish(decode(decoder, config, latents, strips=1))
            seconds.append(time.perf_counter() - start)

        once()
        peak = peak_of(once)
        return {"decode_s": seconds[1], "peak_bytes": peak, "plan_bytes": plan, "plan_ratio": peak / plan}

    with limits():
        outcome.figures["decode"] = measure()
        if on_metal():
            with _without_winograd():
                outcome.figures["without_winograd"] = measure()
    judge_memory(outcome, {"decode": outcome.figures["decode"]})
    figures = outcome.figures["decode"]
    outcome.summary = (
        f"{side}x{side} with {config.base_dim} channels is decoded in {figures['decode_s']:.3g} s and "
        f"{amount(figures['peak_bytes'])}, {figures['plan_ratio']:.2f} of the plan"
    )
    return outcome


@contextmanager
def _without_winograd() -> Iterator[None]:
    before = os.environ.get(_WINOGRAD)
    os.environ[_WINOGRAD] = "0"
    try:
        yield
    finally:
        del os.environ[_WINOGRAD]
        if before is not None:
            os.environ[_WINOGRAD] = before
