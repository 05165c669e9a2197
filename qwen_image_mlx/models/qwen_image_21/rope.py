"""Rotary positions of the single stream: which position each token has, and the rotation it stands for.

Knows nothing of pixels, prompts or weights. Formulas: `QwenImage21Rope` in diffusers' transformer_qwenimage21.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..layers import periods, turns
from ..rotary import Rotary

THETA = 10000.0
MAX_POSITION = 8192  # the reference's tables end here, for text and for the place of an image in the sequence
MAX_HALF_SIDE = 1024  # … and here for rows and columns, which count from an image's middle


class Run(NamedTuple):
    """Tokens of one kind in a row: text, each of which sees those before it, or an image, which also sees itself.

    Attributes:
        length: number of tokens.
        grid: rows and columns of an image; None for text.
    """

    length: int
    grid: tuple[int, int] | None = None

    @classmethod
    def image(cls, height: int, width: int) -> Run:
        """An image of that many rows and columns of latents."""
        return cls(height * width, (height, width))


def lay_out(length: int, starts: Sequence[int], grids: Sequence[tuple[int, int]], per_slot: int = 4) -> list[Run]:
    """The runs that a prompt's states and its reference images make.

    Args:
        length: number of states.
        starts: the first state of each image's places, in order.
        grids: rows and columns of each image's latents.
        per_slot: latents that one place stands for, a square of them.

    Raises:
        ValueError: places overlap, or are not all inside the states.
    """
    runs, end = [], 0
    for start, (height, width) in zip(starts, grids, strict=True):
        if start < end:
            raise ValueError(f"the places of an image begin at {start}, inside those of the one before")
        if start > end:
            runs.append(Run(start - end))
        runs.append(Run.image(height, width))
        end = start + height * width // per_slot
    if end > length:
        raise ValueError(f"the images' places end at {end}, but there are {length} states")
    return [*runs, Run(length - end)] if end < length else runs


def last_position(runs: Sequence[Run]) -> int:
    """The highest position that counts up along the sequence."""
    return max((start + (0 if run.grid else run.length - 1) for start, run in zip(_starts(runs), runs, strict=True)))


def rotary_tables(runs: Sequence[Run], axes_dims: Sequence[int]) -> Rotary:
    """Rotations for the tokens of all runs.

    A text token has the same position on all three axes (frame, row, column), one after the other. An image has the
    next position as its frame, rows from -(h - h // 2) to h // 2 - 1 and columns alike; what follows it starts its
    longer side later.

    Args:
        runs: in the order of the sequence.
        axes_dims: channels of the head that turn with frame, row and column; each is even.
    """
    positions = []
    for start, run in zip(_starts(runs), runs, strict=True):
        if run.grid is None:
            text = mx.arange(start, start + run.length, dtype=mx.float32)
            positions.append(mx.stack([text, text, text], axis=-1))
            continue
        height, width = run.grid
        rows = mx.arange(height // 2 - height, height // 2, dtype=mx.float32)
        cols = mx.arange(width // 2 - width, width // 2, dtype=mx.float32)
        grid = [mx.full(run.grid, start, dtype=mx.float32), *mx.meshgrid(rows, cols, indexing="ij")]
        positions.append(mx.stack(grid, axis=-1).reshape(-1, 3))
    position = mx.concatenate(positions)
    angles = mx.concatenate(
        [position[:, axis, None] * (1 / periods(THETA, dim)) for axis, dim in enumerate(axes_dims)], axis=-1
    )
    return Rotary(*turns(angles[:, None], axis=-1))


def _starts(runs: Sequence[Run]) -> list[int]:
    """The position that each run begins at."""
    starts, position = [], 0
    for run in runs:
        starts.append(position)
        position += max(run.grid) if run.grid else run.length
    return starts
