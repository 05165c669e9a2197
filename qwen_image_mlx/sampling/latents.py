"""Packing: a latent image (B, h, w, C) as a sequence of 2x2 patches (B, h/2 * w/2, 4C), and back.

Tokens run in raster order, frame after frame; a token's channels are ordered (C, row, column). Source: the pipelines'
_pack_latents.
"""

from __future__ import annotations

import mlx.core as mx


def pack_latents(latents: mx.array) -> mx.array:
    """(B, h, w, C) with even h and w to (B, h/2 * w/2, 4C)."""
    b, h, w, c = latents.shape
    patches = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack_latents(tokens: mx.array, height: int, width: int) -> mx.array:
    """(B, height/2 * width/2, 4C) to (B, height, width, C); height and width are those of the latents."""
    b, _, channels = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return patches.reshape(b, height, width, channels // 4)


def pack_multi_layer_latents(latents: mx.array) -> mx.array:
    """Frames (B, F, h, w, C) to one sequence (B, F * h/2 * w/2, 4C)."""
    tokens = pack_latents(latents.flatten(0, 1))
    return tokens.reshape(latents.shape[0], -1, tokens.shape[-1])


def unpack_multi_layer_latents(tokens: mx.array, frames: int, height: int, width: int) -> mx.array:
    """(B, F * height/2 * width/2, 4C) to (B, F, height, width, C); height and width are those of the latents."""
    b, _, channels = tokens.shape
    return unpack_latents(tokens.reshape(b * frames, -1, channels), height, width).reshape(
        b, frames, height, width, channels // 4
    )
