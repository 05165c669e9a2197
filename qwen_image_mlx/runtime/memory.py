"""The memory that a user allows, and the plan that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError
from ..pipeline.components import Components
from ..pipeline.limits import usable_memory
from .memory_plan import MemoryPlan, Planner, Work, strips_for
from .residency import LEAST_MEMORY, RESIDENCIES, Residency, read_memory


@dataclass(frozen=True)
class Memory:
    """What a user said of memory.

    Attributes:
        budget: bytes that may be used.
        residencies: those that may be chosen, in this order.
    """

    budget: int
    residencies: tuple[Residency, ...]


def parse_memory(text: str | None) -> Memory:
    """What was said of memory: a figure or "auto" for any residency, a residency's name, or None for the usual one.

    Args:
        text: such as "16GB", "12.5 GiB", "16000000000", "auto", "streamed".

    Raises:
        RequestError: it is none of these, less than 256 MiB, or more than 1 PB.
    """
    budget, residencies = read_memory(text, LEAST_MEMORY)
    return Memory(usable_memory() if budget is None else budget, residencies)


def fitting_plan(components: Components, work: Work, memory: Memory) -> MemoryPlan:
    """The plan of the first residency that fits, in the fewest strips; if none does, the one that takes least.

    Raises:
        RequestError: every residency would quantize layers anew at each pass.
    """
    planners = [Planner(components, work, residency) for residency in memory.residencies]
    able = [planner for planner in planners if not planner.needs_pack]
    if not able:
        raise RequestError(
            "layers that are read from their files at each pass would have to be quantized each time",
            cause="streamed quantization",
        )
    return _first_that_fits(able, memory.budget)


def _first_that_fits(planners: Sequence[Planner], budget: int) -> MemoryPlan:
    least: MemoryPlan | None = None
    for plan in (planner.plan(strip) for planner in planners for strip in strips_for(planner.work)):
        if plan.peak <= budget:
            return plan
        least = plan if least is None or plan.peak < least.peak else least
    assert least is not None
    return least


def alternatives(components: Components, work: Work, budget: int) -> list[MemoryPlan]:
    """The plan of each residency, in the strips that a budget in bytes asks for."""
    return [_first_that_fits([Planner(components, work, residency)], budget) for residency in RESIDENCIES]
