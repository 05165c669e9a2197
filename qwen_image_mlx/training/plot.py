"""A run at a glance: its loss over the steps and the latest sample, as one picture, drawn by Pillow alone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..images.files import replace_file

_WIDTH, _HEIGHT, _MARGIN, _SHEET = 960, 420, 56, 480
_INK, _GRID, _RAW, _SMOOTH = "#333333", "#dddddd", "#b9cfe8", "#1f5fa8"
_TICKS = 5


def plot_run(path: Path, losses: Sequence[tuple[int, float]], sample: Path | None) -> None:
    """Draws (step, loss) pairs, faintly each and strongly their moving average, above the latest sample.

    Raises:
        OutputError: the file could not be written; an older one stays.
    """
    picture = _with_sample(draw_losses(losses), sample)
    data = io.BytesIO()
    picture.save(data, "PNG")
    replace_file(path, data.getvalue())


def draw_losses(losses: Sequence[tuple[int, float]]) -> Image.Image:
    """The curve alone."""
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    smooth = smoothed([loss for _, loss in losses])
    steps = [step for step, _ in losses]
    top = sorted(loss for _, loss in losses)[max(0, math.ceil(0.98 * len(losses)) - 1)]  # a few peaks may leave it
    low, high = min(smooth), max(top, *smooth)
    high = high if high > low else low + 1.0
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def place(step: int, loss: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - first) / (last - first)
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (min(loss, high) - low) / (high - low)
        return x, min(y, _HEIGHT - _MARGIN)

    for n in range(_TICKS):
        level, step = low + (high - low) * n / (_TICKS - 1), first + (last - first) * n // (_TICKS - 1)
        y, x = place(first, level)[1], place(step, low)[0]
        draw.line([(_MARGIN, y), (_WIDTH - _MARGIN, y)], fill=_GRID)
        draw.text((_MARGIN - 6, y), f"{level:.3g}", fill=_INK, anchor="rm")
        draw.text((x, _HEIGHT - _MARGIN + 6), str(step), fill=_INK, anchor="mt")
    draw.line([place(*point) for point in losses], fill=_RAW)
    draw.line([place(*point) for point in zip(steps, smooth, strict=True)], fill=_SMOOTH, width=3)
    draw.text((_MARGIN, _MARGIN / 2), f"loss {smooth[-1]:.4f} after {steps[-1]} steps", fill=_INK, anchor="lm")
    return sheet


def smoothed(values: Sequence[float], decay: float = 0.97) -> list[float]:
    """The exponential moving average, unbiased at its beginning."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def _with_sample(sheet: Image.Image, sample: Path | None) -> Image.Image:
    if sample is None or not sample.is_file():
        return sheet
    with Image.open(sample) as image:
        image = image.convert("RGB")
    image.thumbnail((_WIDTH - 2 * _MARGIN, _SHEET))
    out = Image.new("RGB", (_WIDTH, _HEIGHT + image.height + _MARGIN // 2), "white")
    out.paste(sheet, (0, 0))
    out.paste(image, ((_WIDTH - image.width) // 2, _HEIGHT))
    return out
