"""Runs the autoencoder block by block, and its last blocks, which take the most memory, in strips of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import mlx.core as mx

from ..gpu import Pace, finish

# From rows (B, H, W, C), and optionally a callback for each finished band, to rows, whole or in pieces.
Stage = Callable[..., "mx.array | Iterator[mx.array]"]


class Statistics(Protocol):
    """The part of a config that describes latents: the mean and standard deviation of each channel."""

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


class Encoder(Protocol):
    """Pixels (B, H, W, C) in [-1, 1] to mean and log-variance of latents, as consecutive functions."""

    @property
    def stages(self) -> Sequence[Stage]:
        """All stages."""


class Decoder(Protocol):
    """Latents (B, h, w, z) to pixels (B, H, W, C), not clamped, as functions: on the whole image, then on strips."""

    @property
    def band(self) -> int:
        """Strips begin at multiples of this number of rows of the tail's input."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages that need the whole image."""

    @property
    def tail(self) -> Sequence[Stage]:
        """The remaining stages, which are purely local."""

    @property
    def tail_halo(self) -> int:
        """Rows of the tail's input that it needs above and below a strip."""

    @property
    def tail_scale(self) -> int:
        """Output rows per input row of the tail."""


# Output pixels per strip: about 0.4 GB of activations, and at most a fifth more work for the halos at 1 MP.
STRIP_PIXELS = 512 * 512


def encode_mode(encoder: Encoder, config: Statistics, pixels: mx.array) -> mx.array:
    """Most likely latents of pixels.

    Args:
        encoder: the VAE's encoder.
        config: its config.
        pixels: (B, H, W, C) in [-1, 1], H and W multiples of 8.

    Returns:
        Normalised latents (B, H/8, W/8, z), fp32, evaluated.
    """
    mean, std = _latent_statistics(config)
    return _evaluate((encode_moments(encoder, config, pixels)[0] - mean) / std)


def encode_moments(encoder: Encoder, config: Statistics, pixels: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and standard deviation of the latents of pixels, not normalised: (B, H/8, W/8, z) each, fp32, evaluated."""
    moments = _run(encoder.stages, pixels.astype(mx.float32))
    mean, log_variance = mx.split(moments, 2, axis=-1)
    std = mx.exp(0.5 * mx.clip(log_variance, -30, 20))
    finish(mean, std)
    return mean, std


def sample_latents(config: Statistics, mean: mx.array, std: mx.array, noise: mx.array) -> mx.array:
    """Normalised latents (B, h, w, z), fp32: `mean + std * noise`, with standard normal noise of the same shape."""
    latent_mean, latent_std = _latent_statistics(config)
    return (mean + std * noise - latent_mean) / latent_std


def decode(decoder: Decoder, config: Statistics, latents: mx.array, strips: int | None = None) -> mx.array:
    """Pixels of latents; the number of strips changes memory, never a bit of the result.

    Args:
        decoder: the VAE's decoder.
        config: its config.
        latents: normalised (B, h, w, z).
        strips: the number of strips for the last blocks; None chooses by size.

    Returns:
        (B, 8h, 8w, C) in [0, 1], fp32, evaluated.
    """
    mean, std = _latent_statistics(config)
    x = _run(decoder.stages, latents.astype(mx.float32) * std + mean)
    if strips is None:
        strips = strips_of(x.shape[1] * x.shape[2] * decoder.tail_scale**2, STRIP_PIXELS)
    return decode_tail(decoder, x, strips)


def strips_of(pixels: int, max_pixels: int) -> int:
    """How many strips an image is decoded in, so that each has about `max_pixels` pixels."""
    return max(1, pixels // max_pixels)


def decode_tail(decoder: Decoder, x: mx.array, strips: int) -> mx.array:
    """The second half of `decode`, from the tail's input (B, H, W, C); no strip is smaller than a band."""
    height = x.shape[1]
    bands = -(-height // decoder.band)
    strips = min(strips, bands)
    edges = [min(height, bands * n // strips * decoder.band) for n in range(strips + 1)]
    out = [_strip(decoder, x, top, bottom) for top, bottom in pairwise(edges)]
    pixels = out[0] if strips == 1 else mx.concatenate(out, axis=1)
    finish(pixels)
    return pixels


def _strip(decoder: Decoder, x: mx.array, top: int, bottom: int) -> mx.array:
    """The pixels (B, rows, W, C) that rows top … bottom of the tail's input turn into."""
    above, below = max(0, top - decoder.tail_halo), min(x.shape[1], bottom + decoder.tail_halo)
    scale = decoder.tail_scale
    pixels = _run(decoder.tail, x[:, above:below])[:, (top - above) * scale : (bottom - above) * scale]
    return _evaluate(mx.clip(pixels * 0.5 + 0.5, 0, 1))


def _run(stages: Iterable[Stage], x: mx.array) -> mx.array:
    pace = Pace()  # a convolution takes many times its result while it runs: few bands at a time
    for stage in stages:
        out = stage(x, pace)
        x = _evaluate(out if isinstance(out, mx.array) else mx.concatenate([_evaluate(rows) for rows in out], axis=1))
    return x


def _evaluate(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def _latent_statistics(config: Statistics) -> tuple[mx.array, mx.array]:
    return mx.array(config.latents_mean), mx.array(config.latents_std)
