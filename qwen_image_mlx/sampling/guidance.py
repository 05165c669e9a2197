"""Classifier-free guidance and its variants: how two velocities become one. Arrays in, arrays out."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

APG_RADIUS = 15.0  # the maximum length of APG's difference; the default of diffusers' guider


class Guidance(NamedTuple):
    """How the positive and the negative velocity are combined.

    Attributes:
        scale: `cfg_scale`.
        renormalize: whether each token keeps the length of its positive velocity.
        interval: the part of the steps that are guided, from 0 to 1; the others take the positive velocity alone.
        zero_star: CFG-Zero*: the negative velocity is scaled to fit the positive one, and the first step does not move.
        apg: eta of adaptive projected guidance, which weighs the part of the difference along the positive velocity;
            None is ordinary guidance.
    """

    scale: float
    renormalize: bool
    interval: tuple[float, float] = (0.0, 1.0)
    zero_star: bool = False
    apg: float | None = None

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 0, takes two passes. Source: diffusers' guiders, `start` and `stop`."""
        begin, end = (int(part * steps) for part in self.interval)
        return begin <= step < end

    def rests(self, step: int) -> bool:
        """Whether a step takes no pass: its velocity is 0."""
        return self.zero_star and step == 0


def guide(positive: mx.array, negative: mx.array, guidance: Guidance) -> mx.array:
    """negative + scale * (positive - negative), or the variant that `guidance` chooses, optionally renormalised.

    Args:
        positive, negative: velocities (B, N, C), of one dtype.
        guidance: scale, variant and renormalization.

    Returns:
        (B, N, C) in that dtype; renormalised, each token keeps the length of its positive velocity.
    """
    if guidance.zero_star:
        negative = _fit(positive, negative)
    difference = (positive - negative).astype(mx.float32)
    if guidance.apg is not None:
        difference = _project(difference, positive.astype(mx.float32), guidance.apg)
    # The scale in fp32, as in torch: rounded to bf16, 3.7 would be 3.703.
    combined = negative + (mx.array(guidance.scale, dtype=mx.float32) * difference).astype(positive.dtype)
    if not guidance.renormalize:
        return combined
    return combined * (_token_norm(positive) / _token_norm(combined))


def _fit(positive: mx.array, negative: mx.array) -> mx.array:
    """The negative velocity times the factor that brings it nearest to the positive one, for each image of a batch.

    Source: diffusers' `cfg_zero_star_scale` (CFG-Zero*, arXiv 2503.18886).
    """
    p, n = positive.astype(mx.float32), negative.astype(mx.float32)
    factor = mx.sum(p * n, axis=(1, 2), keepdims=True) / (mx.sum(n * n, axis=(1, 2), keepdims=True) + 1e-8)
    return (factor * n).astype(negative.dtype)


def _project(difference: mx.array, positive: mx.array, eta: float) -> mx.array:
    """The difference (B, N, C), fp32, at most `APG_RADIUS` long, its part along the positive velocity times `eta`.

    Source: diffusers' `normalized_guidance` (APG, arXiv 2410.02416), which projects in float64.
    """
    difference = difference * mx.minimum(1.0, APG_RADIUS / _length(difference))
    unit = positive / mx.maximum(_length(positive), 1e-12)
    along = mx.sum(difference * unit, axis=(1, 2), keepdims=True) * unit
    return difference - along + eta * along


def _length(x: mx.array) -> mx.array:
    return mx.sqrt(mx.sum(x * x, axis=(1, 2), keepdims=True))


def _token_norm(x: mx.array) -> mx.array:
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True).astype(x.dtype)
