"""The start of the denoising loop: noise, or an image with noise added, and the image a mask keeps at each step.

Sources: prepare_latents of diffusers' QwenImage, QwenImageImg2Img and QwenImageInpaint pipelines, in their order of
random draws: the image's latents first, then the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..sampling.latents import LatentSpace
from ..sampling.noise import generator
from ..sampling.schedule import Schedule
from .autoencode import sample_latents
from .conditioning import InitialImage
from .parameters import GenerationParameters


@dataclass(frozen=True)
class Start:
    """The beginning of the loop; all arrays packed, in the model's dtype.

    Attributes:
        latents: the input of the first step (1, N, C).
        schedule: the remaining steps.
        noise: the noise in it (1, N, C).
        image: latents of the initial image (1, N, C), or None.
        mask: 1 where the image is regenerated (1, N, C), or None.
        draw: more noise (1, N, C), fp32, of the same generator, for solvers that add some.
    """

    latents: mx.array
    schedule: Schedule
    noise: mx.array
    image: mx.array | None = None
    mask: mx.array | None = None
    draw: Callable[[], mx.array] | None = field(default=None, compare=False)

    @property
    def blended(self) -> bool:
        """Whether a mask keeps parts of the initial image."""
        return self.mask is not None

    def blend(self, done: int, latents: mx.array) -> mx.array:
        """Latents (1, N, C) with the initial image, noised to the level after `done` steps, where the mask is 0."""
        assert self.image is not None
        assert self.mask is not None
        kept = add_noise(self.image, self.noise, float(self.schedule.sigmas[done]))
        return (1 - self.mask) * kept + self.mask * latents


def draw_start(
    config: Any,
    space: LatentSpace,
    schedule: Schedule,
    parameters: GenerationParameters,
    frames: int,
    seed: int,
    image_index: int,
    latents: mx.array | None,
    initial: InitialImage | None,
    dtype: mx.Dtype,
) -> Start:
    """Draws the random numbers and adds the noise that the first step expects.

    Args:
        config: the autoencoder's config, for the statistics of its latents.
        space: the layout of the latents.
        schedule: all steps.
        parameters: size, strength and source of the noise.
        frames: images that are generated together.
        seed, image_index: seed and index of the noise.
        latents: packed noise (1, N, C) instead of the seed's.
        initial: the image to start from.
        dtype: dtype of the result.
    """
    # Drawn in the reference's order: frames, then channels, rows, columns.
    shape = (frames, space.channels, parameters.height // space.factor, parameters.width // space.factor)
    draws = generator(parameters.rng, seed)
    image = None
    if initial is not None:
        image = sample_latents(config, initial.mean, initial.std, draws.normal(shape).transpose(0, 2, 3, 1))
        image = space.pack(image).astype(dtype)
        schedule = schedule.last(parameters.strength)
    noise = latents
    if noise is None:
        for _ in range(image_index + 1):
            drawn = draws.normal(shape)
        noise = space.pack_frames(drawn.transpose(0, 2, 3, 1)[None])
    packed = noise.shape
    noise = noise.astype(dtype)

    def draw() -> mx.array:
        return draws.normal(packed)

    if image is None or initial is None:
        return Start(noise, schedule, noise, draw=draw)
    mask = None
    if initial.mask is not None:
        mask = space.pack(mx.broadcast_to(initial.mask, (*initial.mask.shape[:3], space.channels))).astype(dtype)
    return Start(add_noise(image, noise, float(schedule.sigmas[0])), schedule, noise, image, mask, draw)


def add_noise(image: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """sigma * noise + (1 - sigma) * image, (1, N, C), in their dtype. Source: FlowMatchEulerDiscreteScheduler."""
    level = mx.array(sigma, dtype=image.dtype)
    return level * noise + (1 - level) * image
