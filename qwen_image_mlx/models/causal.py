"""Causal attention (a token sees itself and earlier ones), in as few kernels as `layers.ATTENTION_FLOP` allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .layers import ATTENTION_FLOP

_ROWS = 64  # queries that Metal's attention kernels treat together, in multiples


class KeyValueCache(Protocol):
    """Keys and values of one layer for the preceding tokens; mlx-lm's caches implement it."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Adds those of new tokens (B, heads, L, head_dim) and returns all (B, heads, S, head_dim)."""


Caches = Sequence[KeyValueCache | None]


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Scaled dot-product attention of the last tokens of a sequence.

    Each query has its own result, so the rows of queries may be split: the numbers stay the same.

    Args:
        q: (B, L, heads, head_dim), of the last L of S tokens.
        k, v: (B, S, key heads, head_dim), of all; `heads` is a multiple of `key heads`.

    Returns:
        (B, L, heads * head_dim).
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    rows = max(_ROWS, int(ATTENTION_FLOP / (4 * q.size // length * k.shape[2])) // _ROWS * _ROWS)
    out = []
    for top in range(0, length, rows):
        seen = before + min(top + rows, length)
        out.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, top : top + rows], k[:, :, :seen], v[:, :, :seen], scale=q.shape[-1] ** -0.5, mask="causal"
            )
            .transpose(0, 2, 1, 3)
            .flatten(2)
        )
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=1)
