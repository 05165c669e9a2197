"""The connection between the ranks that mlx.launch started, and what each way of sharing an image would exchange."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pipeline.components import Components
from ..pipeline.pipeline import QwenImagePipeline
from ..runtime.memory_plan import Planner, Work
from ..runtime.ranks import current
from ..runtime.residency import DEFAULT
from ..runtime.traffic import Traffic, is_worth_splitting, traffic_of
from ..weights.synthetic import FULL, write_configs
from .outcome import Outcome

SIDE = 1024
_SLOW = 0.05  # seconds a step, above which the exchange of guidance is noticed: of a step of seconds


def run(options: Mapping[str, Any]) -> Outcome:
    """Measures the connection; every rank calls this."""
    outcome, ranks = Outcome(), current()
    if ranks.size == 1:
        outcome.summary = "this is one process; start it on several Macs with mlx.launch to measure their connection"
        return outcome
    link = ranks.link
    folder, work = Path(options["folder"]) / "configs", Work(width=SIDE, height=SIDE)
    write_configs(folder, FULL)
    components: Components = QwenImagePipeline.from_pretrained(folder).components
    planner = Planner(components, work, DEFAULT)
    found: dict[str, Traffic] = {
        "guidance": traffic_of(planner, "guidance", ranks.size),
        "layers": traffic_of(planner, "layers", ranks.size),
    }
    outcome.figures = {
        "ranks": ranks.size, "latency_s": link.latency, "link_gbs": link.bandwidth / 1e9,
        **{f"{mode}_step_bytes": traffic.nbytes for mode, traffic in found.items()},
        **{f"{mode}_step_s": traffic.seconds(link) for mode, traffic in found.items()},
    }  # fmt: skip
    times = {mode: traffic.seconds(link) for mode, traffic in found.items()}
    outcome.summary = (
        f"{ranks.size} ranks, {link.bandwidth / 1e9:.2f} GB/s and {link.latency * 1e3:.2f} ms between them; a step of "
        f"Qwen-Image at {SIDE}x{SIDE} waits {times['guidance'] * 1e3:.1f} ms where guidance is shared, "
        f"{times['layers'] * 1e3:.0f} ms where blocks are"
    )
    if times["guidance"] > _SLOW:
        outcome.find("slow", f"{outcome.summary}; connect the Macs by Thunderbolt or a wire")
    elif not is_worth_splitting(components, work, ranks.size, link):
        outcome.summary += "; sharing blocks would be slower than streaming them on one Mac"
    return outcome
