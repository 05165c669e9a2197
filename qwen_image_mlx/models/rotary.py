"""Rotations by position that families of networks share: of channel pairs, and of the patches of a vision tower."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .layers import Turns, periods, turn, turns

PATCH_THETA = 10000.0


class Rotary(NamedTuple):
    """The tables that rotate the channel pairs of every token, text first.

    Attributes:
        real: (cos, sin) of the pair's angle: fp32, (tokens, 1, head_dim / 2, 2).
        imag: (-sin, cos), the same shape.
    """

    real: mx.array
    imag: mx.array


def rotate(x: mx.array, real: mx.array, imag: mx.array) -> mx.array:
    """Turns channel pairs (2j, 2j + 1) of x (batch, tokens, heads, head_dim) by the tables' angles, in fp32."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return turn(pairs[..., :1], pairs[..., 1:], real, imag).reshape(x.shape)


def patch_tables(height: int, width: int, merge: int, head_dim: int) -> Turns:
    """Tables (N, 1, 2, head_dim / 2), fp32: half of the angles follow a patch's row, half its column."""
    rows, cols = (
        axis.reshape(height // merge, merge, width // merge, merge).transpose(0, 2, 1, 3).reshape(-1, 1)
        for axis in mx.meshgrid(mx.arange(height), mx.arange(width), indexing="ij")
    )
    frequencies = 1 / periods(PATCH_THETA, head_dim // 2)
    angles = mx.concatenate([rows * frequencies, cols * frequencies], axis=-1)[:, None]
    return turns(angles, axis=-2)
