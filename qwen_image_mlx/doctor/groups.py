"""The table of groups, in the order they run in. Importable without MLX.

To add one: a module with `run(options: Mapping) -> Outcome`, and a row here.
"""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """A group of checks.

    Attributes:
        name: its name for `--only`.
        limit: seconds after which its process is ended; None where that depends on a model.
        what: a description.
        module: its module, if the name differs.
    """

    name: str
    limit: float | None
    what: str
    module: str | None = None


GROUPS = (
    Group("env", 60, "the machine, MLX, and the variables that change what MLX does"),
    Group("network", 120, "the connection between the ranks that mlx.launch started"),
    Group("limits", 60, "how much memory may be used, and which models fit", "fits"),
    Group("probe", 240, "every operation of the networks at real shapes, against fp32 on the CPU"),
    Group("parity", 240, "one block of each network at real width, against the CPU and against stored values"),
    Group("picture", 240, "images of the demo models against stored ones"),
    Group("rates", 180, "how fast the operations are, and how long an image will take"),
    Group("block", 180, "time and memory of a chain of transformer blocks, against the plan"),
    Group("vae", 180, "time and memory of decoding an image, against the plan"),
    Group("disk", 180, "how fast weights are read"),
    Group("errors", 120, "a refused allocation, threads, and how long cancelling takes", "faults"),
)
# Runs only with a golden file.
GOLDEN = Group("golden", None, "a real model against a golden file, stage by stage")
NAMES = tuple(group.name for group in GROUPS)


def group_named(name: str) -> Group:
    """The row of a group that exists."""
    return next(group for group in (*GROUPS, GOLDEN) if group.name == name)
