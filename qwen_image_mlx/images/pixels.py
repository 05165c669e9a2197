"""Between PIL images and arrays of pixels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from PIL import Image

from ..gpu import finish, gpu_faults
from .geometry import Size

_MODES = {3: "RGB", 4: "RGBA"}


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image composited on white, as RGB; any other converted to RGB."""
    info = image.info
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = info.copy()
    return image


def opaque_as_rgb(image: Image.Image) -> Image.Image:
    """An RGBA image without its alpha where that is opaque everywhere; any other as it is."""
    opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
    return image.convert("RGB") if opaque else image


def to_images(pixels: mx.array) -> list[Image.Image]:
    """8-bit images of float pixels (frames, H, W, 3 or 4) in [0, 1]; halves round to even, as in the reference."""
    levels = mx.round(pixels.astype(mx.float32) * 255).astype(mx.uint8)
    with gpu_faults():
        finish(levels)
    return [Image.fromarray(frame, _MODES[frame.shape[-1]]) for frame in np.array(levels)]


def to_pixels(image: Image.Image, size: Size) -> mx.array:
    """An image for the autoencoder: Lanczos-resized, (1, H, W, C) in [-1, 1], fp32. Source: VaeImageProcessor."""
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return mx.array(np.asarray(resized, dtype=np.float32)[None] / 255.0) * 2 - 1


def to_patches(
    image: Image.Image, size: Size, *, patch: int, merge: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> mx.array:
    """An image for the vision tower: bicubic-resized, normalised, cut into patches.

    Args:
        image: an RGB image.
        size: a multiple of `patch * merge` on both sides.
        patch: side of a patch in pixels.
        merge: side of a block of patches; patches run block by block in raster order, and so inside a block.
        mean, std: per channel, of values in [0, 1].

    Returns:
        (H / patch * W / patch, 3 * patch * patch), fp32; channels first inside a patch.
        Source: Qwen2VLImageProcessor.
    """
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    values = (np.asarray(resized, dtype=np.float32) / 255.0 - np.asarray(mean, np.float32)) / np.asarray(
        std, np.float32
    )
    h, w = size[1] // patch, size[0] // patch
    blocks = values.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
    return mx.array(blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, -1))


def to_mask(image: Image.Image, size: Size) -> np.ndarray:
    """A mask as the reference reads it: Lanczos-resized grey values, 1 where they are at least a half, else 0.

    Returns:
        (H, W), float32.
    """
    smooth = image if image.mode in ("L", "RGB", "RGBA") else image.convert("L")  # palettes resize by nearest
    grey = smooth.resize(size, Image.Resampling.LANCZOS).convert("L")
    return (np.asarray(grey, dtype=np.float32) / 255.0 >= 0.5).astype(np.float32)
