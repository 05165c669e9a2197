"""Layers as a slide of PowerPoint (PPTX, written), through python-pptx, which is imported when it is used."""

from __future__ import annotations

import io
from pathlib import Path

from ..errors import RequestError
from .libraries import library
from .stack import LayerStack

_EMU_PER_PIXEL = 9525  # at 96 pixels an inch
_MIN_SLIDE, _MAX_SLIDE = 914_400, 51_206_400  # PowerPoint's limits, 1 and 56 inches


def write_pptx(stack: LayerStack, path: Path) -> None:
    """Writes one slide of the canvas's shape, every layer a named image at its offset, hidden ones hidden.

    Raises:
        RequestError: python-pptx is absent, or the canvas is longer than a slide may be.
        OSError: it could not be written.
    """
    pptx = library("pptx", "writing pptx")
    unit = min(_EMU_PER_PIXEL, _MAX_SLIDE / max(stack.size))
    unit = max(unit, _MIN_SLIDE / min(stack.size))
    if unit * max(stack.size) > _MAX_SLIDE:
        raise RequestError(
            f"a canvas of {stack.size} px is longer than a slide may be; no side may be 56 times the other"
        )
    show = pptx.Presentation()
    show.slide_width, show.slide_height = (round(side * unit) for side in stack.size)
    slide = show.slides.add_slide(show.slide_layouts[6])  # the blank one
    for layer in stack.layers:
        buffer = io.BytesIO()
        layer.image.save(buffer, "PNG")
        shape = slide.shapes.add_picture(buffer, *(round(n * unit) for n in (*layer.offset, *layer.image.size)))
        shape.name = layer.name
        if not layer.visible:
            shape._element.nvPicPr.cNvPr.set("hidden", "1")
        if layer.opacity < 1:
            blip = shape._element.blipFill.find(pptx.oxml.ns.qn("a:blip"))
            effect = blip.makeelement(pptx.oxml.ns.qn("a:alphaModFix"), {"amt": str(round(layer.opacity * 100_000))})
            blip.insert(0, effect)
    show.save(str(path))
