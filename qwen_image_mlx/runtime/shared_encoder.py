"""How ranks share encoding: each encodes some of the prompts, and all get the states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..pipeline.seams import ConditionEncoder, Encoded
from .ranks import Ranks

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.conditioning import EncodingModel, Encodings, GuidanceEncoding
    from ..pipeline.reporter import Reporter
    from ..pipeline.request import Request


class SharedEncoder:
    """A `ConditionEncoder` whose prompts are dealt out; a rank without one loads no text encoder.

    Args:
        ranks: of this run; all of them encode the same prompts and images.
        encoder: of this rank.
    """

    def __init__(self, ranks: Ranks, encoder: ConditionEncoder):
        self._ranks, self._encoder = ranks, encoder
        self.caption = encoder.caption

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image],
        report: Reporter,
        sequential_positions: bool = False,
        reference_pixels: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Encoded:
        """As `ConditionEncoder.encode`."""
        size = self._ranks.size
        own = range(self._ranks.rank, len(prompts), size)
        made = self._encoder.encode(prompts, images, report, sequential_positions, reference_pixels, own)
        self._ranks.meet()
        everyone = self._ranks.gather_arrays(made.states)
        wanted = range(len(prompts)) if only is None else only
        return Encoded([everyone[number % size][number // size] for number in wanted], made.starts)


class SharedEncodings:
    """Stored `Encodings` of ranks that encode together: one is used if all ranks have it.

    Args:
        ranks: of this run.
        stored: of this rank; None stores nothing.
    """

    def __init__(self, ranks: Ranks, stored: Encodings | None):
        self._ranks, self._stored = ranks, stored

    def get(self, pipeline: EncodingModel, request: Request) -> GuidanceEncoding | None:
        """As `Encodings.get`."""
        found = self._stored.get(pipeline, request) if self._stored is not None else None
        self._ranks.meet()
        return found if all(self._ranks.gather_values(found is not None)) else None

    def put(self, pipeline: EncodingModel, request: Request, encoding: GuidanceEncoding) -> None:
        """As `Encodings.put`."""
        if self._stored is not None:
            self._stored.put(pipeline, request, encoding)
