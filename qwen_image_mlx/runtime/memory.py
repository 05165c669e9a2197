"""The memory that a user allows, and the choice of a plan that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError
from ..pipeline.components import Components
from ..pipeline.limits import usable_memory
from .memory_plan import MemoryPlan, Planner, Work, strips_for
from .residency import MIN_MEMORY, RESIDENCIES, Residency, read_memory


@dataclass(frozen=True)
class Memory:
    """The user's choice for memory.

    Attributes:
        budget: bytes that may be used.
        residencies: the allowed residencies, in order of preference.
    """

    budget: int
    residencies: tuple[Residency, ...]


def parse_memory(text: str | None) -> Memory:
    """Parses the option memory: a size or "auto" for any residency, a residency's name, or None for the default.

    Args:
        text: such as "16GB", "12.5 GiB", "16000000000", "auto", "streamed".

    Raises:
        RequestError: it is none of these, less than 256 MiB, or more than 1 PB.
    """
    budget, residencies = read_memory(text, MIN_MEMORY)
    return Memory(usable_memory() if budget is None else budget, residencies)


def fitting_plan(components: Components, work: Work, memory: Memory) -> MemoryPlan:
    """The plan of the first residency that fits, in the fewest strips; if none fits, the plan with the lowest peak.

    Raises:
        RequestError: every residency would quantize layers again at each pass.
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
    smallest: MemoryPlan | None = None
    for plan in (planner.plan(strip) for planner in planners for strip in strips_for(planner.work)):
        if plan.peak <= budget:
            return plan
        smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
    assert smallest is not None
    return smallest


def alternatives(components: Components, work: Work, budget: int) -> list[MemoryPlan]:
    """The plan of each residency, with strips that fit a budget in bytes."""
    return [_first_that_fits([Planner(components, work, residency)], budget) for residency in RESIDENCIES]
