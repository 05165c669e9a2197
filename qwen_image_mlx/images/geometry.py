"""Sizes, always (width, height), that images are resized to for the models.

Pure arithmetic on integers. Sources: calculate_dimensions of diffusers' QwenImage edit pipelines, smart_resize of
transformers' image_processing_qwen2_vl.py.
"""

from __future__ import annotations

import math

from ..errors import RequestError

Size = tuple[int, int]

MAX_ASPECT = 200  # the vision tower's own limit


def size_of_area(area: int, size: Size) -> Size:
    """The size of about `area` pixels with the aspect of `size`, both sides multiples of 32 (halves round to even).

    Raises:
        RequestError: one side is more than 200 times the other.
    """
    check_aspect(size)
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return max(1, round(width / 32)) * 32, max(1, round(width / ratio / 32)) * 32


def vision_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size that the vision tower's processor resizes to: multiples of `factor`, area within the limits."""
    width, height = size
    w, h = (round(side / factor) * factor for side in size)
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * grow / factor) * factor for side in size)
    return w, h


def check_aspect(size: Size) -> None:
    """Raises RequestError for an image with one side over 200 times the other, which no model takes."""
    if max(size) > MAX_ASPECT * min(size):
        raise RequestError(f"an image of {size[0]}x{size[1]} is too long; at most {MAX_ASPECT}:1 works, crop it first")
