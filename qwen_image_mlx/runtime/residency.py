"""How weights may be kept in memory, and how that, or a budget, is written. Importable without MLX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RequestError
from ..registry import TEXT_ENCODER, TRANSFORMER, VISION

LEAST_MEMORY = 1 << 28  # bytes that anything runs in
MOST_MEMORY = 10**15  # more than any machine has
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Residency:
    """Which weights are in memory when.

    Attributes:
        name: how it is called.
        staged: encoders are released before generating, the transformer before the last image is decoded.
        streamed: components whose layers are read from their files at each pass.
    """

    name: str
    staged: bool = True
    streamed: frozenset[str] = frozenset()

    @property
    def releases(self) -> dict[str, bool]:
        """What `pipeline.conductor.generate` is to release, and `decompose`, by the names of their arguments."""
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
    """Bytes of 16GB, 12.5 GiB, 16000000000; None of what is no figure, of whatever size."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?", text.strip().lower(), re.ASCII)
    return int(float(match[1]) * _UNITS[match[2] or ""]) if match else None


def read_memory(text: str | None, least: int = LEAST_MEMORY) -> tuple[int | None, tuple[Residency, ...]]:
    """What was said of memory: (budget in bytes, or None for what this machine has; the residencies to choose from).

    Args:
        text: such as "16GB", "12.5 GiB", "16000000000", "auto", "streamed"; None is the usual residency.
        least: bytes that a budget has at least.

    Raises:
        RequestError: it is none of these, less than `least`, or more than 1 PB.
    """
    said = DEFAULT.name if text is None else text.strip().lower()
    if named := tuple(residency for residency in RESIDENCIES if residency.name == said):
        return None, named
    if said == "auto":
        return None, RESIDENCIES
    nbytes = memory_figure(said)
    if nbytes is None:
        raise RequestError(f"memory is {text!r:.80}, but must be like 16GB, 12.5GiB, a number of bytes, or auto")
    if nbytes < least:
        raise RequestError(f"memory is {text!r}; nothing runs in less than {least >> 20} MiB")
    if nbytes > MOST_MEMORY:
        raise RequestError(f"memory is {text!r}, but at most {MOST_MEMORY // 10**15} PB can be said")
    return nbytes, RESIDENCIES
