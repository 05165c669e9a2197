"""Memory that work takes in addition to weights and results: a model, whose constants each generation states.

A generation's `Denoiser` hands its table over, a row for each backend; `runtime/memory_plan.py` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Rate:
    """The cost of many units: `each` for every unit, plus `first` for each of the first `until` units.

    What a GPU has in flight grows with the work only as far as MLX queues it.
    """

    each: float
    first: float = 0.0
    until: int = 0

    def __call__(self, count: int) -> float:
        """The cost of `count` of them."""
        return self.each * count + self.first * min(count, self.until)


@dataclass(frozen=True)
class Costs:
    """Bytes that work takes in addition to weights and results.

    Attributes:
        text: of the tokens of all prompts, per byte of the text encoder's width (hidden and intermediate together).
        patch: of an image's patches in the vision tower, per byte of its width.
        image, reference, prompt: per token of each kind in a step, and byte of the transformer's width.
        guided: extra per token of each kind, if guidance adds a second pass.
        queued: of the tokens of the larger of target and references, the same way.
        scores: per head, byte and pair of the transformer's tokens; 0 where attention is one fused kernel.
        pixel_in: per pixel and base channel of the VAE that it encodes.
        pixel_whole, pixel_out, pixel_kept: per pixel of a decoded image before the strips, of a strip with its halo,
            and again of the image while its strips are decoded; per channel of the decoder's result.
        read: copies of a transient weight in memory while the table is made.
        base, step: constant bytes of any work, and of any step.
    """

    text: Rate
    patch: Rate
    image: float
    reference: float
    prompt: float
    guided: float
    queued: Rate
    scores: float
    pixel_in: float
    pixel_whole: Rate
    pixel_out: float
    read: float
    base: int
    step: int
    pixel_kept: float = 0.0


HALO = 144  # extra rows of pixels that a strip is decoded with


def backend() -> str:
    """The key of `COSTS` for where work is done: Metal and CUDA are alike."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"
