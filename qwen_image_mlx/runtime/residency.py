"""Residencies (which weights are in memory when), and how the option memory is written. Importable without MLX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RequestError
from ..registry import TEXT_ENCODER, TRANSFORMER, VISION

MIN_MEMORY = 1 << 28  # bytes; nothing runs in less
MAX_MEMORY = 10**15  # bytes; more than any machine has
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Residency:
    """A rule for which weights are in memory in which stage.

    Attributes:
        name: its name in options and tables.
        staged: encoders are released before generating, the transformer before the last image is decoded.
        streamed: components whose layers are read from their files at each pass.
    """

    name: str
    staged: bool = True
    streamed: frozenset[str] = frozenset()

    @property
    def releases(self) -> dict[str, bool]:
        """The arguments of `pipeline.conductor.generate` and `decompose` that decide what they release."""
        return {"release_encoders": self.staged, "release_transformer": self.staged}


_ENCODERS = frozenset({TEXT_ENCODER, VISION})
# From the fastest to the most frugal.
RESIDENCIES = (
    Residency("resident", staged=False),
    Residency("staged"),
    Residency("staged, encoders streamed", streamed=_ENCODERS),
    Residency("streamed", streamed=_ENCODERS | {TRANSFORMER}),
)
DEFAULT = RESIDENCIES[1]


def memory_figure(text: str) -> int | None:
    """Bytes of a size such as 16GB, 12.5 GiB or 16000000000, unchecked; None for any other text."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?", text.strip().lower(), re.ASCII)
    return int(float(match[1]) * _UNITS[match[2] or ""]) if match else None


def read_memory(text: str | None, minimum: int = MIN_MEMORY) -> tuple[int | None, tuple[Residency, ...]]:
    """Parses the option memory: (budget in bytes, or None for this machine's; the residencies to choose from).

    Args:
        text: such as "16GB", "12.5 GiB", "16000000000", "auto", "streamed"; None is the default residency.
        minimum: minimum bytes of a budget.

    Raises:
        RequestError: it is none of these, less than `minimum`, or more than 1 PB.
    """
    name = DEFAULT.name if text is None else text.strip().lower()
    if named := tuple(residency for residency in RESIDENCIES if residency.name == name):
        return None, named
    if name == "auto":
        return None, RESIDENCIES
    nbytes = memory_figure(name)
    if nbytes is None:
        raise RequestError(f"memory is {text!r:.80}, but must be like 16GB, 12.5GiB, a number of bytes, or auto")
    if nbytes < minimum:
        raise RequestError(f"memory is {text!r}; nothing runs in less than {minimum >> 20} MiB")
    if nbytes > MAX_MEMORY:
        raise RequestError(f"memory is {text!r}, but at most {MAX_MEMORY // 10**15} PB is allowed")
    return nbytes, RESIDENCIES
