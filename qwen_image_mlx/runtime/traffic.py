"""What ranks exchange in a step, counted, and how long that takes over a measured connection."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.layers import Relay
from ..names import Parallel
from ..pipeline.components import Components
from ..registry import MAIN, TRANSFORMER
from .memory_plan import MemoryPlan, Planner, Work
from .ranks import Link, parts
from .residency import DEFAULT, Residency

# Bytes a second at which the SSD of a Mac is read; what streamed layers are compared with.
DISK = 3e9


@dataclass(frozen=True)
class Traffic:
    """The exchanges of one step.

    Attributes:
        gathered: bytes that each rank receives from all others at the end of a step.
        relayed: bytes that go from each rank to the next, for each branch.
        branches: how many there are.
        ranks: how many there are.
    """

    gathered: int
    relayed: int
    branches: int
    ranks: int

    @property
    def nbytes(self) -> int:
        """Bytes that the last rank receives."""
        return self.gathered + self.relayed * self.branches

    def seconds(self, link: Link) -> float:
        """What the connection adds to a step.

        The first branch goes through all ranks; a rank receives the next one once it has run the one before.
        """
        hops = (self.ranks - 1 + self.branches - 1) * link.seconds(self.relayed) if self.relayed else 0.0
        return hops + link.seconds(self.gathered)

    def turns(self) -> float:
        """The time that the ranks compute in a step, as a share of the time in which one alone runs all branches."""
        if self.relayed:  # a branch takes 1 / ranks of its time on each, and the ranks fill up one after another
            return (self.ranks + self.branches - 1) / (self.ranks * self.branches)
        return 1 / self.branches if self.gathered else 1.0


@dataclass(frozen=True)
class Blocks:
    """A `Relay` that only says which blocks a rank has, for its plan."""

    blocks: range

    def receive(self, block: int, streams: object) -> list:
        """Is never called."""
        raise AssertionError("nothing runs on a rank that is only planned")

    send = receive


def traffic_of(planner: Planner, mode: Parallel, ranks: int) -> Traffic:
    """The exchanges of a step; the first of a model that keeps its prefix takes more.

    Args:
        planner: knows the work's tokens.
        mode: how the work is shared.
        ranks: how many there are.
    """
    config, branches = planner.transformer_config, 2 if planner.work.guided else 1
    latents = planner.target_tokens * config.in_channels * planner.itemsize
    if mode == "guidance":
        return Traffic((ranks - 1) * latents, 0, branches, ranks)
    if mode == "layers":
        relayed = (planner.target_tokens + planner.repeated_tokens) * config.dim * planner.itemsize
        return Traffic((ranks - 1) * branches * latents, relayed, branches, ranks)
    return Traffic(0, 0, branches, ranks)


def is_worth_splitting(components: Components, work: Work, ranks: int, link: Link) -> bool:
    """Whether the connection takes less time in a step than reading the transformer from an SSD would."""
    planner = Planner(components, work, DEFAULT)
    read = planner.read(TRANSFORMER, planner.specs(TRANSFORMER, MAIN)) / DISK
    return traffic_of(planner, "layers", ranks).seconds(link) < read


def plans_of_ranks(components: Components, work: Work, ranks: int, residency: Residency = DEFAULT) -> list[MemoryPlan]:
    """The plan of each rank, with the blocks that it would have.

    Raises:
        RequestError: there are more ranks than blocks.
    """
    plans = []
    with components.unconnected():
        for blocks in parts(components.depth(TRANSFORMER), ranks):
            relay: Relay = Blocks(blocks)
            components.relay = relay
            plans.append(Planner(components, work, residency).plan(work.width * work.height))
            components.relay = None
    return plans


def table_of_ranks(components: Components, work: Work, link: Link, ranks: int) -> str:
    """For people: bytes of each rank and the time of the connection, for each way of sharing."""
    planner, lines = Planner(components, work, DEFAULT), []
    lines.append(f"{ranks} ranks; {link.bandwidth / 1e9:.2f} GB/s and {link.latency * 1e3:.2f} ms between them")
    whole = planner.plan(work.width * work.height).peak
    if work.guided:
        found = traffic_of(planner, "guidance", ranks)
        lines.append(
            f"guidance  {whole / 1e9:.2f} GB on each rank; a step exchanges {found.nbytes / 1e6:.2f} MB "
            f"in {found.seconds(link) * 1e3:.1f} ms"
        )
    lines.append(f"images    {whole / 1e9:.2f} GB on each rank; nothing is exchanged in a step")
    if ranks <= components.depth(TRANSFORMER):
        each = ", ".join(f"{plan.peak / 1e9:.2f}" for plan in plans_of_ranks(components, work, ranks))
        found = traffic_of(planner, "layers", ranks)
        slow = "" if is_worth_splitting(components, work, ranks, link) else "; slower than streaming on one machine"
        lines.append(
            f"layers    {each} GB; a step exchanges {found.nbytes / 1e6:.2f} MB in "
            f"{found.seconds(link) * 1e3:.1f} ms{slow}"
        )
    return "\n".join(lines)
