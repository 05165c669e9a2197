"""How ranks share encoding: each encodes some of the prompts, and all get the states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..pipeline.seams import ConditionEncoder, Encoded
from .ranks import Ranks

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..names import CaptionLanguage
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
        wanted, size = range(len(prompts)) if only is None else only, self._ranks.size
        own = wanted[self._ranks.rank :: size]
        made = self._encoder.encode(prompts, images, report, sequential_positions, reference_pixels, own)
        self._ranks.meet()
        everyone = self._ranks.gather_arrays(made.states)
        return Encoded([everyone[place % size][place // size] for place in range(len(wanted))], made.starts)

    def caption(self, image: Image, area: int, language: CaptionLanguage, seed: int, report: Reporter) -> str:
        """As `ConditionEncoder.caption`: rank 0 writes it for all."""
        made = self._encoder.caption(image, area, language, seed, report) if self._ranks.leads else ""
        self._ranks.meet()
        return self._ranks.led(lambda: made)


class SharedEncodings:
    """Stored `Encodings` of ranks that encode together: one is used if all ranks have it, of the same prompts.

    A request without a prompt is stored under its image, and chips may write different captions of that.

    Args:
        ranks: of this run.
        stored: of this rank; None stores nothing.
    """

    def __init__(self, ranks: Ranks, stored: Encodings | None):
        self._ranks, self._stored = ranks, stored

    def get(self, pipeline: EncodingModel, request: Request) -> GuidanceEncoding | None:
        """As `Encodings.get`."""
        found = self._stored.get(pipeline, request) if self._stored is not None else None
        prompts = None if found is None else [found.source.prompt, found.source.negative_prompt]
        self._ranks.meet()
        everyone = self._ranks.gather_values(prompts)
        return found if all(one == everyone[0] for one in everyone) else None

    def put(self, pipeline: EncodingModel, request: Request, encoding: GuidanceEncoding) -> None:
        """As `Encodings.put`."""
        if self._stored is not None:
            self._stored.put(pipeline, request, encoding)
