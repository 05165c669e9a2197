"""Rotary positions of the image transformer: the position of each token, and its rotation.

Knows nothing of pixels, prompts or weights. Formulas: `QwenEmbedRope` in diffusers' transformer_qwenimage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..layers import periods, turns
from ..rotary import Rotary

THETA = 10000.0
MAX_POSITION = 4096  # the reference's tables end here, for text and for either half of an image side


class Segment(NamedTuple):
    """One image in the sequence: its frame index and its grid of 2x2 latent patches."""

    frame: int
    height: int
    width: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.height * self.width


def place_images(grids: Sequence[tuple[int, int]], layered: bool) -> list[Segment]:
    """Frame indices of images in their order: 0, 1, 2, …; with layers the last one is their source, at -1.

    Source: QwenEmbedRope and, layered, QwenEmbedLayer3DRope.
    """
    frames = [*range(len(grids))]
    if layered:
        frames[-1] = -1
    return [Segment(frame, *grid) for frame, grid in zip(frames, grids, strict=True)]


def text_start(segments: Sequence[Segment]) -> int:
    """Position of the first text token: past the largest half side of any image and, with layers, past their frames."""
    layers = len(segments) - 1 if segments[-1].frame < 0 else 0
    return max(layers, *(max(s.height // 2, s.width // 2) for s in segments))


def rotary_tables(segments: Sequence[Segment], text_length: int, axes_dims: Sequence[int]) -> Rotary:
    """Rotations for `text_length` text tokens followed by the tokens of every segment, in raster order.

    A text token has the same position on all three axes (frame, row, column). Image rows and columns are centred:
    rows run from -(h - h // 2) to h // 2 - 1.

    Args:
        segments: the images, target first.
        text_length: number of text tokens.
        axes_dims: channels of the head that turn with frame, row and column; each is even.
    """
    start = text_start(segments)
    text = mx.arange(start, start + text_length, dtype=mx.float32)
    positions = [mx.stack([text, text, text], axis=-1)]
    for frame, height, width in segments:
        rows = mx.arange(height // 2 - height, height // 2, dtype=mx.float32)
        cols = mx.arange(width // 2 - width, width // 2, dtype=mx.float32)
        grid = [mx.full((height, width), frame, dtype=mx.float32), *mx.meshgrid(rows, cols, indexing="ij")]
        positions.append(mx.stack(grid, axis=-1).reshape(-1, 3))
    position = mx.concatenate(positions)
    angles = mx.concatenate(
        [position[:, axis, None] / periods(THETA, dim) for axis, dim in enumerate(axes_dims)],
        axis=-1,
    )[:, None]
    return Rotary(*turns(angles, axis=-1))
