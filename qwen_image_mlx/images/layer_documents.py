"""Layers as documents of Photoshop (PSD, both ways) and PowerPoint (PPTX, written), through optional libraries.

psd-tools and python-pptx are imported when they are used. PSD by Adobe's Photoshop File Formats Specification.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from ..errors import QwenImageError, RequestError
from .layers import MAX_PIXELS, Layer, LayerStack, clean_name, composite

logger = logging.getLogger(__name__)

# module -> (package, our extra)
_LIBRARIES = {"psd_tools": ("psd-tools", "psd"), "pptx": ("python-pptx", "pptx")}

_GROUPS = ("group", "artboard")
_PIXELS = ("pixel", "type", "shape", "smartobject")
# What a flat stack cannot hold and what becomes of it: (who, what is said).
_PSD_NOTICES = (
    (lambda layer: layer.kind in _PIXELS[1:], "is no layer of pixels and is read as it was last drawn"),
    (lambda layer: _blending(layer) not in ("normal", "pass_through"), "is blended otherwise and is read as normal"),
    (lambda layer: layer.clipping, "is clipped to the layer below and is read whole"),
    (lambda layer: layer.kind not in _GROUPS and layer.has_mask(), "has a mask, which goes into its alpha"),
    (lambda layer: layer.kind in _GROUPS and layer.has_mask(), "has a mask, which is left out"),
    (lambda layer: layer.kind != "shape" and layer.has_vector_mask(), "has a vector mask, which is left out"),
    (lambda layer: layer.has_effects(), "has effects, which are left out"),
    (lambda layer: layer.kind in _GROUPS and layer.opacity < 255, "has an opacity, which goes to each of its layers"),
)
_PSD_ALPHA = -1  # the channel's number in the file
_PSD_MODES = ("RGB", "GRAYSCALE", "DUOTONE", "INDEXED", "CMYK")

_EMU_PER_PIXEL = 9525  # at 96 pixels an inch
_MIN_SLIDE, _MAX_SLIDE = 914_400, 51_206_400  # PowerPoint's limits, 1 and 56 inches


def library(module: str, purpose: str) -> ModuleType:
    """An optional library; raises RequestError, which says how to install it, if it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, extra = _LIBRARIES[module]
        raise RequestError(f"{purpose} needs {package}: pip install 'qwen-image-mlx[{extra}]'") from error


def write_psd(stack: LayerStack, path: Path) -> None:
    """Writes a PSD: pixel layers as they are, and the merged picture for viewers that know no layers.

    Opacity is rounded to 1/255; metadata is not written.

    Raises:
        RequestError: psd-tools is absent.
        OSError: it could not be written.
    """
    document = library("psd_tools", "writing psd").PSDImage.frompil(_matted(composite(stack)))
    for layer in stack.layers:
        (x, y), opacity = layer.offset, round(layer.opacity * 255)
        record = document.create_pixel_layer(layer.image, top=y, left=x, opacity=opacity)
        record.name = layer.name  # given above, a name beyond Mac Roman could not be written
        record.visible = layer.visible
    # The documented low level: `save` would draw the merged picture anew or warn that it cannot. A negative count says
    # that the merged picture's fourth channel is its transparency; otherwise Photoshop shows it as a saved selection.
    document._record.layer_and_mask_information.layer_info.layer_count = -len(stack.layers)
    with open(path, "wb") as file:
        document._record.write(file)


def is_psd(path: Path) -> bool:
    """Whether a file begins as a PSD or PSB does."""
    with open(path, "rb") as file:
        return file.read(4) == b"8BPS"


def read_psd(path: Path) -> LayerStack:
    """The pixel layers of a PSD or PSB, groups walked in their order.

    What a flat stack of 8-bit RGBA cannot hold is logged: texts, shapes and smart objects are read as they were last
    drawn, masks go into alpha, adjustments and fills are skipped, blending is read as normal, effects, clipping and
    vector masks are left out. A document without layers is one layer.

    Raises:
        RequestError: psd-tools is absent, or the document is damaged, too large or of a colour mode that is not read.
    """
    tools = library("psd_tools", "reading psd")
    try:
        with warnings.catch_warnings():
            # A channel that cannot be unpacked comes back black, with a warning.
            warnings.simplefilter("error", getattr(tools.compression, "PSDDecompressionWarning", UserWarning))
            document = tools.PSDImage.open(path)
            if document.color_mode.name not in _PSD_MODES:
                raise RequestError(f"{path} is in {document.color_mode.name}; convert it to RGB")
            if (document.color_mode.name, document.depth) != ("RGB", 8):
                logger.warning(
                    "%s is in %s of %d bits; it is read as RGB of 8", path, document.color_mode.name, document.depth
                )
            sizes = [layer.width * layer.height for layer in document.descendants() if layer.kind in _PIXELS]
            if max(sum(sizes), document.width * document.height) > MAX_PIXELS:
                raise RequestError(f"{path} holds more than {MAX_PIXELS} pixels; make its layers smaller")
            layers = tuple(_psd_layers(document, path))
            if not layers:
                logger.warning("%s holds no layers of pixels; its whole picture is read as one", path)
                layers = (Layer(document.topil().convert("RGBA"), clean_name(path.stem)),)
            return LayerStack(document.size, layers)
    except QwenImageError:
        raise
    except Exception as error:  # a parser of a thousand structures fails in as many ways on a damaged file
        raise RequestError(f"{path} cannot be read as a PSD: {str(error) or type(error).__name__}") from error


def write_pptx(stack: LayerStack, path: Path) -> None:
    """Writes one slide of the canvas's shape, every layer a named picture on its place, hidden ones hidden.

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


def _matted(merged: Image.Image) -> Image.Image:
    """Colours laid on white beside the alpha: how Photoshop stores a merged picture, and undoes it on reading."""
    pixels = np.asarray(merged).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    pixels[..., :3] = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha))
    return Image.fromarray(pixels.astype(np.uint8))


def _psd_layers(group: Any, path: Path, opacity: float = 1.0, shown: bool = True) -> Iterator[Layer]:
    """Back to front, as psd-tools lists them."""
    for layer in group:
        name = clean_name(layer.name)
        if layer.kind not in (*_GROUPS, *_PIXELS) or (layer.kind in _PIXELS and not layer.width * layer.height):
            logger.warning("%s: layer %s (%s) has no pixels and is skipped", path, name, layer.kind)
            continue
        for applies, notice in _PSD_NOTICES:
            if applies(layer):
                logger.warning("%s: layer %s %s", path, name, notice)
        own, visible = opacity * layer.opacity / 255, shown and layer.visible
        if layer.kind in _GROUPS:
            yield from _psd_layers(layer, path, own, visible)
            continue
        image = _rgba(layer)
        if image is None:
            logger.warning("%s: layer %s (%s) has no pixels and is skipped", path, name, layer.kind)
            continue
        if layer.has_mask():
            image.putalpha(ImageChops.multiply(image.getchannel("A"), _psd_mask(layer)))
        yield Layer(image, name, tuple(layer.offset), visible, own)


def _psd_mask(layer: Any) -> Image.Image:
    mask = layer.mask
    if mask.disabled:
        return Image.new("L", layer.size, 255)
    whole = Image.new("L", layer.size, mask.background_color)
    drawn = mask.topil()
    if drawn is not None:
        whole.paste(drawn.convert("L"), (mask.left - layer.left, mask.top - layer.top))
    return whole


def _rgba(layer: Any) -> Image.Image | None:
    """A layer's pixels, or None if it has none; psd-tools alone would lose the alpha of CMYK."""
    image, alpha = layer.topil(), layer.topil(channel=_PSD_ALPHA)
    if image is None:
        return None
    image = image.convert("RGBA")
    if alpha is not None:
        image.putalpha(alpha.convert("L"))
    return image


def _blending(layer: Any) -> str:
    return layer.blend_mode.name.lower()
