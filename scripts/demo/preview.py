"""Fits the linear map that shows a demo model's latents as a small image (`Variant.preview`)."""

from __future__ import annotations

import numpy as np

from .autoencoder import training_images
from .samples import GRID, Frame

IMAGES = 2000
SEED = 5


def fit_preview(frame: Frame, channels: int) -> list[list[float]]:
    """A row of RGB a latent channel, and one that is added: least squares over images, laid on white.

    Args:
        frame: of the model.
        channels: 3, or 4 for a model of layers.
    """
    images = training_images(SEED, 0, IMAGES, channels)
    latents = spread(frame.latents(images)).reshape(-1, 16).astype(np.float64)
    with_one = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    found, *_ = np.linalg.lstsq(with_one, small(images).reshape(-1, 3), rcond=None)
    return found.round(4).tolist()


def small(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3 or 4), uint8, at an eighth of their size, on white: (N, H/8, W/8, 3) in [-1, 1]."""
    colours = images[..., :3].astype(np.float64)
    if images.shape[-1] == 4:
        alpha = images[..., 3:] / 255
        colours = colours * alpha + 255 * (1 - alpha)
    n, height, width, _ = colours.shape
    return colours.reshape(n, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4)) / 127.5 - 1


def spread(latents: np.ndarray) -> np.ndarray:
    """Packed latents (N, 16, 64) as (N, 8, 8, 16)."""
    cells = latents.reshape(-1, *GRID, 16, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return cells.reshape(-1, 2 * GRID[0], 2 * GRID[1], 16)
