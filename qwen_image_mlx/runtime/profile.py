"""Measures each stage: seconds, and bytes as MLX counts them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from ..pipeline.progress import Progress, ProgressCallback


@dataclass(frozen=True)
class StageCost:
    """The cost of one finished stage.

    Attributes:
        stage: as `Progress` names it, with its detail.
        seconds: from its beginning to its end.
        resident: bytes in use after it.
        peak: maximum bytes in use during it.
        skipped: passes that a step cache left out.
    """

    stage: str
    seconds: float
    resident: int
    peak: int
    skipped: int = 0


class Profile:
    """A progress callback that measures stages and hands everything on.

    Args:
        inner: the next callback; it can cancel as usual.

    Attributes:
        costs: the finished stages.
    """

    def __init__(self, inner: ProgressCallback | None = None):
        self.costs: list[StageCost] = []
        self._inner = inner
        self._begun: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage != "layer":
            self._note(progress)
        if self._inner is not None:
            self._inner(progress)

    def _note(self, progress: Progress) -> None:
        name = f"{progress.stage} {progress.detail}".strip()
        if progress.step == 0 or name not in self._begun:
            self._begun[name] = time.perf_counter()
            mx.reset_peak_memory()
        if progress.step == progress.total:
            seconds = time.perf_counter() - self._begun.pop(name)
            held = mx.get_active_memory()
            self.costs.append(StageCost(name, seconds, held, max(held, mx.get_peak_memory()), progress.skipped))

    def record(self) -> list[dict[str, Any]]:
        """The costs for an image's metadata."""
        return [asdict(cost) | {"seconds": round(cost.seconds, 3)} for cost in self.costs]

    def table(self) -> str:
        """The costs for people."""
        width = max((len(cost.stage) for cost in self.costs), default=0)
        rows = [f"{'':{width}}  {'seconds':>8}  {'held GB':>8}  {'peak GB':>8}"]
        rows += [
            f"{cost.stage:{width}}  {cost.seconds:8.2f}  {cost.resident / 1e9:8.3f}  {cost.peak / 1e9:8.3f}"
            + (f"  {cost.skipped} passes skipped" if cost.skipped else "")
            for cost in self.costs
        ]
        return "\n".join(rows)
