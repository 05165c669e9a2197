"""The frame around an initial image: the size it is generated at, and how the result is composited back into it.

Pillow and numpy only; independent of models. Pixels outside a mask come back bit for bit. Sources of the crop:
get_crop_region and the resize modes "fill" and "crop" of diffusers' VaeImageProcessor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
from PIL import Image

from ..errors import RequestError
from ..names import NamedSize
from ..variants import NAMED_SIZES
from .geometry import Size, size_of_area

Box = tuple[int, int, int, int]
Sides = tuple[int, int, int, int]
MAX_OUTPAINTED = 1 << 26  # pixels
_MAX_SIDE = 16_384

_ONE_MEGAPIXEL = 1024 * 1024
_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Canvas:
    """How generation starts from one image.

    Attributes:
        source: the upright image, RGB or RGBA.
        mask: grey values of its size, white where it is regenerated; None: everywhere.
        size: (width, height) it is generated at.
        result_size: (width, height) of the result.
        composite: put what the mask keeps back into the result.
        box: part of the image that is generated, in its pixels; None: all of it.
        straight: the image as it was, RGBA, whose transparency the result gets; None: the result is opaque.
    """

    source: Image.Image
    mask: Image.Image | None
    size: Size
    result_size: Size
    composite: bool
    box: Box | None = None
    straight: Image.Image | None = None

    @property
    def initial(self) -> tuple[Image.Image, Image.Image | None]:
        """The image and the mask for the model: cropped to the box, if there is one."""
        if self.box is None:
            return self.source, self.mask
        assert self.mask is not None
        return fill(self.source.crop(self.box), self.size), fill(self.mask.crop(self.box), self.size)

    @property
    def resized_source(self) -> Image.Image:
        """The image at the result's size."""
        return _resize(self.source, self.result_size)

    def finish(self, generated: Image.Image) -> Image.Image:
        """The result, RGB or RGBA of `result_size`: resized, pasted back, composited, with its alpha."""
        straight = None if self.straight is None else _resize(self.straight, self.result_size)
        base = (self.resized_source if straight is None else straight).convert(generated.mode)
        if self.box is not None:
            width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
            pasted = base.copy()
            pasted.paste(_cover(generated, (width, height)), self.box[:2])
            generated = pasted
        generated = _resize(generated, self.result_size)
        if self.composite and self.mask is not None:
            generated = Image.composite(generated, base, feather(_resize(self.mask, self.result_size)))
        if straight is not None:
            generated.putalpha(straight.getchannel("A"))
        return generated


def plan_canvas(
    source: Image.Image,
    *,
    mask: Image.Image | None = None,
    size: NamedSize | Size | None = None,
    composite: bool = True,
    crop_padding: int | None = None,
    straight: Image.Image | None = None,
    area: int,
) -> Canvas:
    """Decides how generation starts from an image.

    Args:
        source: the upright image, RGB or RGBA.
        mask: white where it is regenerated; of the image's size.
        size: "1mp" (about 1 MP at the image's aspect, the model's own size), "source" (the same, resized back to the
            image's size), or (width, height). None is "source" with a mask that is composited, else "1mp".
        composite: put what the mask keeps back, bit for bit.
        crop_padding: pixels around the mask: only this region is generated, at the full generation size.
        straight: the image as it was, RGBA, if the result is to have its transparency.
        area: the pixels of "1mp".

    Raises:
        RequestError: the mask's size differs from the image's, it selects nothing or everything, or `size` is unknown.
    """
    if mask is not None:
        mask = _check_mask(mask, source.size)
    if crop_padding is not None and mask is None:
        raise RequestError("a padding around the mask needs a mask")
    if crop_padding is not None and (type(crop_padding) is not int or crop_padding < 0):
        raise RequestError(
            f"the padding around the mask is {crop_padding!r}, but must be a whole number of pixels from 0"
        )
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if size is not None and not is_pair and size not in NAMED_SIZES:
        raise RequestError(f"size is {size!r}, but must be {' or '.join(map(repr, NAMED_SIZES))} or (width, height)")
    if size is None:
        size = "source" if mask is not None and composite else "1mp"
    generated = size_of_area(area, source.size) if isinstance(size, str) else size
    box = None if crop_padding is None or mask is None else crop_region(mask, generated, crop_padding)
    # A crop goes back into the whole image.
    result = source.size if size == "source" or box is not None else generated
    return Canvas(source, mask, generated, result, composite, box, straight)


def extend(image: Image.Image, sides: Sides) -> tuple[Image.Image, Image.Image]:
    """An image with room around it, filled with its edge's colours, and the mask that is white there.

    Args:
        image: RGB or RGBA.
        sides: pixels to the left, above, to the right and below.

    Raises:
        RequestError: no side grows, or the result is too large.
    """
    left, top, right, bottom = sides
    if not any(sides):
        raise RequestError("outpainting by 0,0,0,0 adds nothing: give LEFT,TOP,RIGHT,BOTTOM in pixels")
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > MAX_OUTPAINTED:
        raise RequestError(f"outpainted, the image has {width}x{height} pixels; at most {MAX_OUTPAINTED:,} work")
    around = ((top, bottom), (left, right), (0, 0))
    wide = Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))
    mask = Image.new("L", wide.size, 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return wide, mask


def parse_sides(text: str | Sequence[int]) -> Sides:
    """Pixels to the left, above, to the right and below, of "64,0,64,0" or four numbers; raises RequestError."""
    try:
        parts = text.split(",") if isinstance(text, str) else [*text]
        sides = tuple(int(part) if isinstance(part, str) else index(part) for part in parts)
    except (TypeError, ValueError):
        sides = ()
    if len(sides) != 4 or not all(0 <= side <= _MAX_SIDE for side in sides):
        raise RequestError(
            f"outpaint is {text!r:.80}, but must be LEFT,TOP,RIGHT,BOTTOM, each from 0 to {_MAX_SIDE} pixels, such as "
            "256,0,256,0"
        )
    return sides[0], sides[1], sides[2], sides[3]


def feather(mask: Image.Image) -> Image.Image:
    """A mask as opacity: 0 outside, rising over some pixels inside, so that the seam lies within what was generated."""
    inside = np.asarray(mask.convert("L")) >= 128
    width = max(1, round(4 * math.sqrt(mask.width * mask.height / _ONE_MEGAPIXEL)))
    depth = np.zeros(inside.shape, np.float32)
    for _ in range(width):
        depth += inside
        edge = np.pad(inside, 1, mode="edge")  # the image's own border is not a seam
        inside = inside & edge[:-2, 1:-1] & edge[2:, 1:-1] & edge[1:-1, :-2] & edge[1:-1, 2:]
    return Image.fromarray(np.rint(depth / width * 255).astype(np.uint8))


def crop_region(mask: Image.Image, size: Size, padding: int) -> Box:
    """Box around the mask, padded, and widened towards the aspect of `size` as far as the image goes."""
    rows, cols = (np.flatnonzero(np.asarray(mask.convert("L")).any(axis=axis)) for axis in (1, 0))
    x1, x2 = max(int(cols[0]) - padding, 0), min(int(cols[-1]) + 1 + padding, mask.width)
    y1, y2 = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, mask.height)
    ratio = size[0] / size[1]
    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = _widen(y1, y2, (x2 - x1) / ratio, mask.height)
    else:
        x1, x2 = _widen(x1, x2, (y2 - y1) * ratio, mask.width)
    return x1, y1, x2, y2


def _widen(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """Widens a range on both sides to `length` pixels, then shifts and cuts it to fit 0 … limit."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def fill(image: Image.Image, size: Size) -> Image.Image:
    """Fits an image into a size, centred, its edges stretched over what remains."""
    width, height = size
    ratio, source_ratio = width / height, image.width / image.height
    inner_w = width if ratio < source_ratio else image.width * height // image.height
    inner_h = height if ratio >= source_ratio else image.height * width // image.width
    resized = image.resize((inner_w, inner_h), _LANCZOS)
    out = Image.new(image.mode, size)
    left, top = width // 2 - inner_w // 2, height // 2 - inner_h // 2
    out.paste(resized, (left, top))
    if ratio < source_ratio and top > 0:
        out.paste(resized.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        out.paste(resized.resize((width, top), box=(0, inner_h, width, inner_h)), (0, top + inner_h))
    elif ratio > source_ratio and left > 0:
        out.paste(resized.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        out.paste(resized.resize((left, height), box=(inner_w, 0, inner_w, height)), (left + inner_w, 0))
    return out


def _cover(image: Image.Image, size: Size) -> Image.Image:
    """Undoes `fill`: scales an image to cover a size and crops the rest."""
    width, height = size
    wider = image.width * height > width * image.height
    scaled = image.resize(
        (image.width * height // image.height, height) if wider else (width, image.height * width // image.width),
        _LANCZOS,
    )
    left, top = scaled.width // 2 - width // 2, scaled.height // 2 - height // 2
    return scaled.crop((left, top, left + width, top + height))


def _check_mask(mask: Image.Image, size: Size) -> Image.Image:
    if mask.size != size:
        raise RequestError(
            f"the mask has {mask.width}x{mask.height} pixels, but the image {size[0]}x{size[1]}; make them equal"
        )
    grey = mask.convert("L")
    generated = np.asarray(grey) >= 128
    if not generated.any():
        raise RequestError("the mask is black everywhere, so nothing would be generated; white is what is regenerated")
    if generated.all():
        raise RequestError("the mask is white everywhere, so nothing would be kept; leave the mask out")
    return grey


def _resize(image: Image.Image, size: Size) -> Image.Image:
    return image if image.size == size else image.resize(size, _LANCZOS)
