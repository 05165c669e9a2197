"""An image as a stack of layers: layers, moving and scaling them, the composite, the contact sheet.

Pillow and numpy only. Layers go from back to front, alpha is straight (not premultiplied).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import RequestError
from ..images.colour import in_srgb
from ..images.geometry import Size

MAX_SIDE = 30_000  # Photoshop's own limit for a PSD, canvas and layers alike
MAX_OFFSET = 300_000
MAX_LAYERS = 1000
MAX_NAME = 255
MAX_PIXELS = 1 << 29  # of all layers together: 2 GiB of RGBA
MAX_CANVAS = 150_000_000  # of one image: A0 at 300 dots an inch, 600 MB of RGBA

# What XML 1.0 cannot hold, or no text encoding can.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BAND_PIXELS = 1 << 18  # so that float64 never holds more than a few of these at once
_GAP, _SQUARE = 8, 8


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        image: RGBA, straight alpha; colours under alpha 0 are kept as they are. An embedded colour profile is
            applied: all of a stack is sRGB.
        name: printable, at most 255 characters.
        offset: (x, y) of its upper left corner on the canvas in pixels; may lie outside.
        visible: False leaves it out of the composite.
        opacity: 0 to 1, multiplied with the image's alpha.

    Raises:
        RequestError: a field is of the wrong type or out of range.
    """

    image: Image.Image
    name: str = ""
    offset: tuple[int, int] = (0, 0)
    visible: bool = True
    opacity: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image) or self.image.mode != "RGBA":
            kind = getattr(self.image, "mode", type(self.image).__name__)
            raise RequestError(f"a layer's image is {kind}, but must be a Pillow image in RGBA; convert it first")
        check_size(self.image.size, "a layer")
        object.__setattr__(self, "image", in_srgb(self.image, "a layer's image"))
        if not isinstance(self.name, str) or self.name != clean_name(self.name):
            raise RequestError(
                f"a layer's name is {self.name!r:.80}, but must be text of at most {MAX_NAME} printable characters"
            )
        if not _are_whole(self.offset, -MAX_OFFSET, MAX_OFFSET):
            raise RequestError(
                f"a layer's offset is {self.offset!r:.80}, but must be (x, y) in whole pixels within ±{MAX_OFFSET}"
            )
        object.__setattr__(self, "offset", tuple(self.offset))
        if not isinstance(self.visible, bool):
            raise RequestError(f"a layer's visibility is {self.visible!r:.80}, but must be true or false")
        if not _is_number(self.opacity) or not 0 <= self.opacity <= 1:
            raise RequestError(f"a layer's opacity is {self.opacity!r:.80}, but must be from 0 to 1")


@dataclass(frozen=True)
class LayerStack:
    """Layers on a canvas.

    Attributes:
        size: (width, height) of the canvas in pixels.
        layers: back to front; at least one.
        metadata: the parameters that made them (seed, prompt, …), JSON-serialisable.

    Raises:
        RequestError: the number of layers or the size of the canvas is out of range.
    """

    size: Size
    layers: tuple[Layer, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_size(self.size, "the canvas")
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "layers", tuple(self.layers))
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise RequestError(f"a stack has {len(self.layers)} layers, but must have from 1 to {MAX_LAYERS}")

    def hide(self, *indices: int) -> LayerStack:
        """The stack with these layers invisible; raises RequestError for one that does not exist."""
        return self._changed({index: {"visible": False} for index in indices})

    def move(self, index: int, dx: int, dy: int) -> LayerStack:
        """The stack with a layer moved right by `dx` and down by `dy` pixels; raises RequestError out of range."""
        x, y = self._at(index).offset
        return self._changed({index: {"offset": (x + dx, y + dy)}})

    def scale(self, index: int, factor: float) -> LayerStack:
        """The stack with a layer's visible part scaled about its centre, so that it stays in place.

        Args:
            index: which layer, 0 is the backmost.
            factor: 0.5 halves both sides. Resampled with Lanczos on premultiplied colours, so edges gain no fringe.

        Raises:
            RequestError: the layer does not exist, or the factor is not positive or makes it too large.
        """
        layer = self._at(index)
        if not _is_number(factor) or not factor > 0:
            raise RequestError(f"layer {index} cannot be scaled by {factor!r:.80}; give a positive number")
        box = layer.image.getchannel("A").getbbox()
        if box is None or factor == 1:
            return self
        sides = box[2] - box[0], box[3] - box[1]
        wide, high = (max(1, round(side * factor)) if side * factor < math.inf else MAX_SIDE + 1 for side in sides)
        size = wide, high
        if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
            raise RequestError(f"layer {index} scaled by {factor} would be larger than {MAX_SIDE} px; scale it by less")
        offset = tuple(
            round(layer.offset[axis] + (box[axis] + box[axis + 2]) / 2 - size[axis] / 2) for axis in range(2)
        )
        image = layer.image.crop(box).resize(size, Image.Resampling.LANCZOS)
        return self._changed({index: {"image": image, "offset": offset}})

    def _at(self, index: int) -> Layer:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.layers):
            raise RequestError(
                f"layer {index!r:.80} does not exist; layers go from 0, the backmost, to {len(self.layers) - 1}"
            )
        return self.layers[index]

    def _changed(self, changes: dict[int, dict[str, Any]]) -> LayerStack:
        layers = list(self.layers)
        for index, fields in changes.items():
            layers[index] = replace(self._at(index), **fields)
        return replace(self, layers=tuple(layers))


def composite(stack: LayerStack, hide: Iterable[int] = ()) -> Image.Image:
    """The composite of a stack: every visible layer over those behind it.

    Source over with straight alpha, as W3C's Compositing and Blending Level 1, 5.1 and 9.1.4, has it:
    alpha = as + ab (1 - as) and colour = (as Cs + ab Cb (1 - as)) / alpha, in float64 through all layers and rounded
    once at the end. Two layers come out within one level of `Image.alpha_composite`, which rounds after each.

    Args:
        stack: the layers.
        hide: indices of layers to leave out in addition to the invisible ones.

    Returns:
        RGBA of the canvas's size; (0, 0, 0, 0) where no layer is.

    Raises:
        RequestError: a layer to hide does not exist.
    """
    width, height = stack.size
    shown = [layer for layer in stack.hide(*hide).layers if layer.visible and layer.opacity > 0]
    result = np.empty((height, width, 4), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = result[top : top + rows]
        colour, alpha = np.zeros((*band.shape[:2], 3)), np.zeros((*band.shape[:2], 1))  # colour is premultiplied here
        for layer in shown:
            box = _overlap(layer, (0, top, width, top + len(band)))
            if box is None:
                continue
            (x, y), (left, upper, right, lower) = layer.offset, box
            source = np.asarray(layer.image.crop((left - x, upper - y, right - x, lower - y)), np.float64)
            place = slice(upper - top, lower - top), slice(left, right)
            opacity = source[..., 3:] * (layer.opacity / 255)
            colour[place] = source[..., :3] * opacity + colour[place] * (1 - opacity)
            alpha[place] = opacity + alpha[place] * (1 - opacity)
        band[..., :3] = np.rint(np.divide(colour, alpha, out=colour, where=alpha > 0))
        band[..., 3:] = np.rint(alpha * 255)
        band[band[..., 3] == 0] = 0
    return Image.fromarray(result)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images over R, G and B, in dB; infinite if they are equal.

    10 log10(255² / mean squared difference). Alpha is not looked at: lay transparent images on something first.

    Raises:
        RequestError: the images differ in size.
    """
    if a.size != b.size:
        raise RequestError(f"images of {a.size} and {b.size} px cannot be compared; resize one of them")
    difference = np.asarray(a.convert("RGB"), np.int32) - np.asarray(b.convert("RGB"), np.int32)
    error = float(np.mean(np.square(difference, out=difference), dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def contact_sheet(stack: LayerStack, *, max_side: int = 2048) -> Image.Image:
    """Every layer at its place on the canvas, hidden ones too, and the composite, side by side.

    Args:
        stack: the layers.
        max_side: maximum side of the sheet in pixels.

    Returns:
        RGB. A grid of equal cells from left to right and top to bottom: layer 0 (the backmost) first, the composite
        last, each with its number on a checkerboard that shows through where it is transparent.
    """
    alone = (LayerStack(stack.size, (replace(layer, visible=True),)) for layer in stack.layers)
    scale, columns, rows = max(_grids(stack.size, len(stack.layers) + 1, max_side))
    width, height = (max(1, math.floor(side * scale)) for side in stack.size)
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), _GAP + rows * (height + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, height // 12))
    for number, cell in enumerate(chain(alone, (stack,))):
        x, y = _GAP + number % columns * (width + _GAP), _GAP + number // columns * (height + _GAP)
        image = composite(cell).resize((width, height), Image.Resampling.BOX)
        sheet.paste(Image.alpha_composite(_checkerboard((width, height)), image).convert("RGB"), (x, y))
        label = str(number) if number < len(stack.layers) else "="
        draw.text((x + 6, y + 3), label, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return sheet


def clean_name(name: str) -> str:
    """A layer's name without characters that some format cannot hold, cut to 255 characters."""
    return _UNPRINTABLE.sub("", name)[:MAX_NAME]


def check_size(size: Any, what: str) -> None:
    """Raises RequestError unless `size` is a (width, height) that fits into memory; `what` names it."""
    if not _are_whole(size, 1, MAX_SIDE):
        raise RequestError(f"{what} has the size {size!r:.80}, but must have two sides from 1 to {MAX_SIDE} px")
    if size[0] * size[1] > MAX_CANVAS:
        raise RequestError(
            f"{what} has the size {size!r}, but must have at most {MAX_CANVAS:,} pixels; make it smaller"
        )


def _are_whole(pair: Any, low: int, high: int) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high for value in pair)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _overlap(layer: Layer, box: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    (x, y), (width, height) = layer.offset, layer.image.size
    left, upper, right, lower = max(x, box[0]), max(y, box[1]), min(x + width, box[2]), min(y + height, box[3])
    return (left, upper, right, lower) if left < right and upper < lower else None


def _grids(size: Size, count: int, max_side: int) -> Iterator[tuple[float, int, int]]:
    """(scale of a cell, columns, rows) of every grid that holds `count` cells."""
    for columns in range(1, count + 1):
        grid = columns, -(-count // columns)
        room = ((max_side - _GAP * (cells + 1)) / cells for cells in grid)
        yield (min(1.0, *(free / side for free, side in zip(room, size, strict=True))), *grid)


def _checkerboard(size: Size) -> Image.Image:
    rows, columns = (np.arange(side) // _SQUARE % 2 for side in (size[1], size[0]))
    grey = np.where(rows[:, None] ^ columns, 204, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGBA")
