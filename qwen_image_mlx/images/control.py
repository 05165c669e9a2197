"""Control images made from ordinary ones: edges, grey, blur, lines, tiles. NumPy and Pillow only.

Each works at the size of the result. Depth maps and poses need networks of their own, and are given as images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from ..errors import RequestError
from ..names import ControlKind
from .geometry import Size

_LANCZOS = Image.Resampling.LANCZOS
_LOW, _HIGH = 100, 200  # thresholds of the gradient's length, of 8-bit levels; OpenCV's examples have these
_BLUR = 6.0  # radius in pixels for a side of 512
_TILE = 4  # times that a tile is made smaller
_LINE = 6.0  # radius for a side of 512, against which a line is darker


def control_image(image: Image.Image, kind: ControlKind, size: Size) -> Image.Image:
    """The control image of an RGB image.

    Args:
        image: any size.
        kind: a key of `KINDS`.
        size: (width, height) of the result.

    Raises:
        RequestError: the kind is unknown.
    """
    if kind not in KINDS:
        raise RequestError(f"the kind of control image is {kind!r}, but must be one of {', '.join(KINDS)}")
    return KINDS[kind](image.convert("RGB").resize(size, _LANCZOS))


def canny(image: Image.Image) -> Image.Image:
    """Edges, white on black: smoothed, thinned to the ridges of the gradient, and traced from strong to weak ones.

    Source: J. Canny, A Computational Approach to Edge Detection (1986).
    """
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
    padded = np.pad(grey, 1, mode="edge")
    tops, rows, ends = padded[:-2], padded[1:-1], padded[2:]
    across = (tops[:, 2:] - tops[:, :-2]) + 2 * (rows[:, 2:] - rows[:, :-2]) + (ends[:, 2:] - ends[:, :-2])
    down = (ends - tops)[:, :-2] + 2 * (ends - tops)[:, 1:-1] + (ends - tops)[:, 2:]
    length = np.hypot(across, down)
    ridges = _ridges(length, across, down)
    return _from_mask(_connect(ridges & (length >= _LOW), ridges & (length >= _HIGH)))


def gray(image: Image.Image) -> Image.Image:
    """The brightness without the colours."""
    return image.convert("L").convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """The image without its details."""
    return image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size) / 512))


def lineart(image: Image.Image) -> Image.Image:
    """Dark lines, drawn white on black: where a pixel is darker than what is around it."""
    grey = image.convert("L")
    around = grey.filter(ImageFilter.GaussianBlur(_LINE * max(image.size) / 512))
    darker = np.asarray(around, dtype=np.float32) - np.asarray(grey, dtype=np.float32)
    levels = np.clip((darker - 4) * 8, 0, 255)  # noise of a few levels is not a line
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def tile(image: Image.Image) -> Image.Image:
    """The image at a quarter of its size, made large again: what it shows, without sharpness."""
    small = max(1, image.width // _TILE), max(1, image.height // _TILE)
    return image.resize(small, Image.Resampling.BOX).resize(image.size, _LANCZOS)


KINDS: dict[ControlKind, Callable[[Image.Image], Image.Image]] = {
    "image": lambda image: image,
    "canny": canny,
    "gray": gray,
    "blur": blur,
    "lineart": lineart,
    "tile": tile,
}


def _ridges(length: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where the gradient (H, W) is the longest along its own direction, of four."""
    padded = np.pad(length, 1)
    h, w = length.shape

    def shifted(y: int, x: int) -> np.ndarray:
        return padded[1 + y : 1 + y + h, 1 + x : 1 + x + w]

    sector = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(length.shape, bool)
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ridge |= (sector == number) & (length >= shifted(y, x)) & (length > shifted(-y, -x))
    return ridge


def _connect(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The weak pixels (H, W) that touch strong ones, directly or through other weak ones."""
    found, front = strong, strong
    while front.any():
        padded = np.pad(front, 1)
        h, w = front.shape
        near = np.zeros_like(front)
        for y in range(3):
            for x in range(3):
                near |= padded[y : y + h, x : x + w]
        front = near & weak & ~found
        found = found | front
    return found


def _from_mask(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
