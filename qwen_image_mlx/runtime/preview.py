"""Small images of the generation after each step, made from the latents that a step reports anyway.

No pass of the model and no decoder: the clean latents that a step points to, through a linear map to RGB
(`Variant.preview`). A 1024x1024 generation costs a product of (4096, 64) with (64, 12) and a resize of 128x128 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.progress import Progress, ProgressCallback
    from ..pipeline.request import Request

MAX_SIDE = 512

Show = Callable[[Image.Image, int, int], None]


class Preview:
    """A progress callback that hands everything on and then shows the clean image that each step predicts.

    The clean latents that a step points to come with it (`Progress.denoised`), whatever the solver. Where a mask keeps
    an image they are exactly that image. An edit's references are not in the latents. The layers of a layered
    model are shown side by side, back to front, in rows, without the first frame, which is the whole image.

    Args:
        show: called with an RGB image, at most `MAX_SIDE` pixels and never larger than the generation, the number of
            steps done and of all; an exception from it ends the generation.
        inner: the next callback; it is called first, and can cancel as usual.
        pipeline: the opened checkpoint, for its map to RGB and its frames.
        request: what is generated.
    """

    def __init__(
        self, show: Show, inner: ProgressCallback | None, pipeline: QwenImagePipeline, request: Request
    ) -> None:
        parameters, variant, space = request.parameters, pipeline.variant, pipeline.latent_space
        self._show, self._inner, self._space = show, inner, space
        self._rows, self._columns = space.grid(parameters.width, parameters.height)
        self._hidden = 1 if variant.layered and not request.parameters.single_layer else 0
        *factors, bias = variant.preview
        # A token's values are (channel, row, column) of a patch of latents; one product gives (row, column, RGB).
        patch = np.eye(space.patch**2, dtype=np.float32)
        self._map = np.einsum("cr,ij->cijr", np.array(factors, np.float32), patch).reshape(space.token_channels, -1)
        self._bias = np.array(bias, np.float32)

    def __call__(self, progress: Progress) -> None:
        """Hands the progress on, then shows a preview if it was a denoising step."""
        if self._inner is not None:
            self._inner(progress)
        if progress.stage == "denoise" and progress.denoised is not None:
            colours = np.array(progress.denoised[0]) @ self._map
            self._show(self._image(colours), progress.step, progress.total)

    def _image(self, colours: np.ndarray) -> Image.Image:
        """The image of mapped latents (N, 3 patch²), float32, in [-1, 1] before the bias."""
        rows, columns, patch = self._rows, self._columns, self._space.patch
        cells = colours.reshape(-1, rows, columns, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        frames = cells.reshape(-1, patch * rows, patch * columns, 3)[self._hidden :]
        levels = np.rint(np.clip((frames + self._bias + 1) * 127.5, 0, 255)).astype(np.uint8)
        image = Image.fromarray(_tile(levels))
        width, height = image.size
        scale = min(self._space.factor, MAX_SIDE / max(width, height))
        return image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _tile(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) in rows of a grid that is about as wide as high; unused places are white."""
    count, height, width, _ = frames.shape
    across = math.ceil(math.sqrt(count))
    down = -(-count // across)
    white = np.full((across * down - count, height, width, 3), 255, np.uint8)
    grid = np.concatenate([frames, white]).reshape(down, across, height, width, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, 3)
