"""Memory that work takes in addition to weights and results: a model, with constants for each backend.

Those of a CPU are measured by benchmarks/full_size.py and benchmarks/vae.py; those of Metal are modelled.
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
        pixel_whole, pixel_out: per pixel of a decoded image before the strips, and of a strip with its halo.
        read: copies of a modulation weight in memory while the table is made.
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
    pixel_whole: float
    pixel_out: float
    read: float
    base: int
    step: int


COSTS = {
    "cpu": Costs(
        text=Rate(1.0), patch=Rate(0.0), image=20.0, reference=20.0, prompt=20.0, guided=0.0, queued=Rate(0.0),
        scores=1.2, pixel_in=115.0, pixel_whole=26.0, pixel_out=40.0, read=1.19, base=40 << 20, step=0,
    ),
    # Modelled: the smallest constants that cover the results of benchmarks/metal_model.py for Metal, with command
    # buffers of 40 or 50 kernels.
    "gpu": Costs(
        text=Rate(0.75, 2.5, 2000), patch=Rate(0.1, 5.2, 5476), image=11.4, reference=7.3, prompt=11.0, guided=6.6,
        queued=Rate(0.0, 12.5, 3000), scores=0.0, pixel_in=26.4, pixel_whole=13.6, pixel_out=22.3,
        read=1.19, base=80 * 10**6, step=220 * 10**6,
    ),
}  # fmt: skip
HALO = 144  # extra rows of pixels that a strip is decoded with


def backend() -> str:
    """The key of `COSTS` for where work is done: Metal and CUDA are alike."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"
