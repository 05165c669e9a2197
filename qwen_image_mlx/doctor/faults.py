"""Behaviour on faults: a refused allocation, arrays that cross threads, cancelling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..errors import Cancelled
from ..gpu import finish
from ..weights.synthetic import FULL
from .chip import device_info
from .measure import on_gpu, on_metal
from .outcome import Outcome
from .parts import block_inputs, chain, chained_block

_SIDE, _CPU_SIDE = 64, 16  # of the chain's image, in tokens
_BLOCKS = 400  # of a chain that is cancelled long before its end
_MAX_BLOCKS = 8  # that cancelling may take; two are queued, and one is being built


def run(options: Mapping[str, Any]) -> Outcome:
    """Tries each fault."""
    outcome = Outcome()
    refusal = outcome.figures["refused_allocation"] = allocate_too_much()
    if refusal.startswith("not refused"):
        outcome.find("odd", "an array larger than the memory was not refused; keep --memory below what you have")
    outcome.figures["finished_array_across_threads"] = finished = across_threads(lazy=False)
    outcome.figures["lazy_array_across_threads"] = across_threads(lazy=True)
    if finished != "works":
        outcome.find("odd", f"a finished array of another thread cannot be used ({finished}); the server needs that")
    block_s, latency = cancel_chain()
    outcome.figures |= {"block_s": block_s, "cancel_s": latency, "cancel_blocks": latency / block_s}
    if latency > _MAX_BLOCKS * block_s + 0.5:
        outcome.find("odd", f"cancelling took {latency:.1f} s, or {latency / block_s:.0f} blocks, where 3 are usual")
    outcome.summary = (
        f"work is cancelled within {latency:.2g} s, {latency / block_s:.1f} blocks; finished arrays cross "
        f"threads; an array that is too large: {refusal.partition(' (')[0]}"
    )
    return outcome


def allocate_too_much() -> str:
    """Allocates an array above the maximum buffer size; returns the outcome in words."""
    if not on_metal():
        return "not tried (MLX refuses it on Metal only: its CPU backend crashes, CUDA would take the memory)"
    rows = 2 * int(device_info()["max_buffer_length"]) >> 20
    try:
        finish(mx.full((rows, 1 << 20), 1, dtype=mx.uint8))
    except (RuntimeError, MemoryError, ValueError):
        return "refused" if mx.sum(mx.ones(8)).item() == 8 else "refused, but nothing works any more"
    return "not refused"


def across_threads(lazy: bool) -> str:
    """Makes an array in a thread and uses it here; "works", or MLX's error."""
    made: list[mx.array] = []

    def make() -> None:
        made.append(mx.arange(8) + 1)
        if not lazy:
            finish(made)

    _in_thread(make)
    try:
        return "works" if mx.sum(made[0] * 2).item() == 72 else "gives wrong numbers"
    except RuntimeError as error:
        return str(error)


def cancel_chain() -> tuple[float, float]:
    """Seconds of a block in a chain, and from a cancel in the middle of it until nothing runs any more."""
    config = replace(FULL["transformer"], num_attention_heads=8 if on_gpu() else 3)
    side = _SIDE if on_gpu() else _CPU_SIDE
    block, inputs = chained_block(config), block_inputs(64, [(side, side)], mx.bfloat16, config)
    chain(block, inputs, 2)
    block_s = chain(block, inputs, 4) / 4
    stopped = threading.Event()
    cancelled: list[float] = []

    def cancel() -> None:
        cancelled.append(time.perf_counter())
        stopped.set()

    def on_layer(count: int) -> None:
        if stopped.is_set():
            raise Cancelled("cancelled by the check")

    timer = threading.Timer(5.5 * block_s, cancel)
    timer.start()
    try:
        chain(block, inputs, _BLOCKS, on_layer=on_layer)
    except Cancelled:
        mx.synchronize()
    timer.join()
    return block_s, time.perf_counter() - cancelled[0]


def _in_thread(fn: Callable[[], None]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()
