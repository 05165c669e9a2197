"""Small pictures of what is being painted, step by step, made of nothing but the latents that a step reports anyway.

No pass of the model and no decoder: the clean latents that a step points to, through a linear map to RGB
(`Variant.preview`). A 1024x1024 painting costs a product of (4096, 64) with (64, 12) and a resize of 128x128 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image

from ..pipeline.parameters import SIZE_STEP

if TYPE_CHECKING:
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.progress import Progress, ProgressCallback
    from ..pipeline.request import Request

MAX_SIDE = 512
_CELL = SIZE_STEP // 2  # pixels of the picture along a latent's side
# Velocities are measured over at least so much noise: latents in bf16 are rounded by about 0.002, which over the first
# of 50 steps (0.007 of noise at 1 MP) would be grain as strong as a third of the picture.
_SPAN = 0.05

Show = Callable[[Image.Image, int, int], None]


class Preview:
    """A progress callback that shows what each denoising step is heading for, after handing everything on.

    With latents x after a step and noise level s, the velocity is v = (x - x') / (s - s'), where x' are those of an
    earlier step, and the clean latents it points to are x - s v. Where a mask keeps a picture this is exactly that
    picture, because it is put back with the same noise each time. An edit's references are not in the latents. Of a
    layered model the layers are shown side by side, back to front, in rows; the frame with everything is not.

    Args:
        show: called with an RGB picture, at most `MAX_SIDE` pixels and never larger than the painting, the number of
            steps done and of all; what it raises ends the painting.
        inner: the callback that it stands before; it is told first, and can cancel as ever.
        pipeline: the opened checkpoint, which knows its map and its frames.
        request: what is painted.
    """

    def __init__(
        self, show: Show, inner: ProgressCallback | None, pipeline: QwenImagePipeline, request: Request
    ) -> None:
        parameters, variant = request.parameters, pipeline.variant
        self._show, self._inner = show, inner
        self._rows, self._columns = parameters.height // SIZE_STEP, parameters.width // SIZE_STEP
        self._hidden = 1 if variant.layered else 0
        *factors, bias = variant.preview
        # A token's 64 values are (channel, row, column) of 2x2 latents; one product gives (row, column, RGB).
        self._map = np.einsum("cr,ij->cijr", np.array(factors, np.float32), np.eye(4, dtype=np.float32)).reshape(-1, 12)
        self._bias = np.array(bias, np.float32)
        self._seen: list[tuple[float, np.ndarray]] = []

    def __call__(self, progress: Progress) -> None:
        """Hands on, then shows, if it was a denoising step."""
        if self._inner is not None:
            self._inner(progress)
        if progress.stage != "denoise" or progress.latents is None:
            return
        # The map is linear: mapped first, only a fifth of the numbers have to be remembered.
        colours = np.array(progress.latents[0].astype(mx.float32)) @ self._map
        if progress.step == 0:
            self._seen = []
        else:
            # Of those seen, the last that is far enough away; in the beginning the first.
            while len(self._seen) > 1 and self._seen[1][0] - progress.sigma >= _SPAN:
                del self._seen[0]
            sigma, before = self._seen[0]
            velocity = (colours - before) / (progress.sigma - sigma)
            self._show(self._picture(colours - progress.sigma * velocity), progress.step, progress.total)
        self._seen.append((progress.sigma, colours))

    def _picture(self, colours: np.ndarray) -> Image.Image:
        """The picture of mapped latents (N, 12), in [-1, 1] but for the bias."""
        rows, columns = self._rows, self._columns
        cells = colours.reshape(-1, rows, columns, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        frames = cells.reshape(-1, 2 * rows, 2 * columns, 3)[self._hidden :]
        levels = np.rint(np.clip((frames + self._bias + 1) * 127.5, 0, 255)).astype(np.uint8)
        picture = Image.fromarray(_tiled(levels))
        width, height = picture.size
        scale = min(_CELL, MAX_SIDE / max(width, height))
        return picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _tiled(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) in rows of a grid that is about as wide as high; what is left over is white."""
    count, height, width, _ = frames.shape
    across = math.ceil(math.sqrt(count))
    down = -(-count // across)
    white = np.full((across * down - count, height, width, 3), 255, np.uint8)
    grid = np.concatenate([frames, white]).reshape(down, across, height, width, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, 3)
