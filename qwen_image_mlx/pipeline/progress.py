"""Progress: the state that a running call reports to its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..names import Stage

if TYPE_CHECKING:
    import mlx.core as mx


class Passes(NamedTuple):
    """The passes through the transformer of one image; a guided step has two.

    Attributes:
        run: those that were computed.
        skipped: those that a step cache left out.
    """

    run: int = 0
    skipped: int = 0


@dataclass
class Progress:
    """The argument of a progress callback.

    Attributes:
        stage: "download", "load", "caption", "encode", "denoise", "decode" or "quantize"; and "layer", within "encode"
            and "denoise", after each layer of a model, so that long steps can be followed and cancelled.
        step, total: units done and units in all: bytes for "download", tokens written and at most for "caption",
            denoising steps for "denoise", layers for "layer", else 0 of 1 when the work begins and 1 of 1 when it is
            done. Steps and layers are reported when the GPU has at most two layers left to compute.
        detail: file or component, for "download", "load" and "layer".
        sigma: the noise level after the step, for "denoise".
        latents: packed latents (1, N, C) after the step, for "denoise"; reading them waits until they are there.
        skipped: passes that a step cache has left out so far, for "denoise".
        denoised: the clean latents (1, N, C), fp32, that the step points to, for "denoise"; None before the first.
            They are computed only if the callback reads them, inside the call.
    """

    stage: Stage
    step: int
    total: int
    detail: str = ""
    sigma: float | None = None
    latents: mx.array | None = None
    skipped: int = 0
    denoised: mx.array | None = None
    _cancelled: bool = field(default=False, init=False, repr=False)

    def cancel(self) -> None:
        """Stops the work: the running call raises `Cancelled`, and the pipeline stays usable."""
        self._cancelled = True


ProgressCallback = Callable[[Progress], None]
Shown = ProgressCallback | Literal[False] | None
"""A callback; False for nothing; None for progress bars on stderr, unless the pipeline has a callback of its own."""
