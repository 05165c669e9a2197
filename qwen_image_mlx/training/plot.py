"""A run at a glance: its loss over the steps and the latest sample, as one image, drawn by Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import replace_file

_FINE = 2  # drawn larger by this factor, then reduced: smooth lines
_WIDTH, _HEIGHT, _MARGIN, _SHEET = 960, 420, 56, 480
_INK, _GRID, _RAW, _SMOOTH = "#333333", "#dddddd", "#b9cfe8", "#1f5fa8"
_TICKS = 5


def plot_run(path: Path, losses: Sequence[tuple[int, float]], sample: Path | None) -> None:
    """Draws (step, loss) pairs in a faint line and their moving average in a strong one, above the latest sample.

    Raises:
        OutputError: the file could not be written; an older one stays.
    """
    image = _with_sample(draw_losses(losses), sample)
    data = io.BytesIO()
    image.save(data, "PNG")
    replace_file(path, data.getvalue())


def draw_losses(losses: Sequence[tuple[int, float]]) -> Image.Image:
    """The loss curve without a sample."""
    width, height, margin = (_FINE * side for side in (_WIDTH, _HEIGHT, _MARGIN))
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FINE * 12)
    curve, steps = smooth([loss for _, loss in losses]), [step for step, _ in losses]
    ordered, cut = sorted(loss for _, loss in losses), len(losses) // 50  # a few peaks may leave the image
    low, high = min(ordered[cut], *curve), max(ordered[-1 - cut], *curve)
    high = high if high > low else low + 1.0
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def place(step: int, loss: float) -> tuple[float, float]:
        level = (min(max(loss, low), high) - low) / (high - low)
        x = margin + (width - 2 * margin) * (step - first) / (last - first)
        return x, height - margin - (height - 2 * margin) * level

    for n in range(_TICKS):
        level, step = low + (high - low) * n / (_TICKS - 1), first + (last - first) * n // (_TICKS - 1)
        y, x = place(first, level)[1], place(step, low)[0]
        draw.line([(margin, y), (width - margin, y)], fill=_GRID, width=_FINE)
        draw.text((margin - 12, y), f"{level:.3g}", fill=_INK, anchor="rm", font=font)
        draw.text((x, height - margin + 12), str(step), fill=_INK, anchor="mt", font=font)
    draw.line([place(*point) for point in losses], fill=_RAW, width=_FINE)
    draw.line([place(*point) for point in zip(steps, curve, strict=True)], fill=_SMOOTH, width=3 * _FINE)
    text = f"loss {curve[-1]:.4f} after {steps[-1]} steps"
    draw.text((margin, margin / 2), text, fill=_INK, anchor="lm", font=font)
    return sheet.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def smooth(values: Sequence[float], decay: float = 0.97) -> list[float]:
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
