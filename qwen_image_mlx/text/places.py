"""The positions of images in an encoded prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .prompt import TokenizedPrompt


def image_starts(tokens: TokenizedPrompt, grids: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The first row of each image among the encoder's rows from `tokens.first` on, in order.

    Args:
        tokens: the prompt.
        grids: rows and columns of each image's features, the same that `tokenize_prompt` took.
    """
    places = np.flatnonzero(tokens.is_image)
    before = accumulate((rows * columns for rows, columns in grids), initial=0)
    return tuple(int(places[count]) - tokens.first for count, _ in zip(before, grids, strict=False))
