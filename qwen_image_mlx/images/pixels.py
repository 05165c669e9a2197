"""Between arrays of pixels and PIL images."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from PIL import Image

_MODES = {3: "RGB", 4: "RGBA"}


def to_images(pixels: mx.array) -> list[Image.Image]:
    """8-bit images of pixels (frames, H, W, 3 or 4) in [0, 1]; halves round to even, as in the reference."""
    levels = np.array(mx.round(pixels.astype(mx.float32) * 255).astype(mx.uint8))
    return [Image.fromarray(frame, _MODES[frame.shape[-1]]) for frame in levels]
