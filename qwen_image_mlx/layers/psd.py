"""Layers as Photoshop documents (PSD, both ways), through psd-tools, which is imported when it is used.

By Adobe's Photoshop File Formats Specification.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from ..errors import QwenImageError, RequestError
from ..images.colour import in_srgb
from .libraries import library
from .stack import MAX_PIXELS, Layer, LayerStack, check_size, clean_name, composite

logger: logging.Logger = logging.getLogger(__name__)

_GROUPS = ("group", "artboard")
_PIXELS = ("pixel", "type", "shape", "smartobject")
# What a flat stack cannot hold: (whether a layer has it, the warning). Every field that changes how a layer
# looks is applied or listed here; fill opacity and a mask's density are applied.
_PSD_NOTICES = (
    (lambda layer: layer.kind in _PIXELS[1:], "is not a pixel layer and is read as it was last drawn"),
    (lambda layer: _blending(layer) not in ("normal", "pass_through"), "is not blended as normal and is read so"),
    (lambda layer: layer._record.clipping, "is clipped to the layer below and is read whole"),
    (lambda layer: layer.kind not in _GROUPS and layer.has_mask(), "has a mask, which goes into its alpha"),
    (lambda layer: layer.kind in _GROUPS and layer.has_mask(), "has a mask, which is left out"),
    (lambda layer: _mask_field(layer, "user_mask_feather"), "has a mask with a feather, which is left out"),
    (lambda layer: _is_cut(layer), "has a vector mask, which is left out"),
    (lambda layer: _has_effects(layer), "has effects, which are left out"),
    (lambda layer: layer.kind in _GROUPS and _psd_opacity(layer) < 1,
     "has an opacity, which goes to each of its layers"),
    (lambda layer: layer.kind == "artboard", "is an artboard: its background is left out, its layers are read whole"),
    (lambda layer: _blends_by_ranges(layer), "is blended by ranges (Blend If), which are left out"),
    (lambda layer: layer.tagged_blocks.get_data(b"brst"),
     "is blended in some channels alone and is read in all"),
    (lambda layer: layer.tagged_blocks.get_data(b"knko"), "knocks out what is below, which is left out"),
)  # fmt: skip
_PSD_EFFECTS = (b"lfx2", b"lmfx", b"lfxs", b"lrFX")  # blocks of effects; the first that is there counts
_USUAL_RANGE = (0, 65535)  # of Blend If: nothing is left out
_FAR, _MANY = 16, 0.01  # levels and share of pixels: beyond both a stack differs from its file's merged image
_PSD_PROFILE = 1039  # the image resource that holds an ICC profile
_PSD_ALPHA = -1  # the channel's number in the file
_PSD_MODES = ("RGB", "GRAYSCALE", "DUOTONE", "INDEXED", "CMYK")


def write_psd(stack: LayerStack, path: Path) -> None:
    """Writes a PSD: pixel layers as they are, and the merged image for viewers without layers.

    Opacity is rounded to 1/255; metadata is not written.

    Raises:
        RequestError: psd-tools is absent.
        OSError: it could not be written.
    """
    document = library("psd_tools", "writing psd").PSDImage.frompil(_matte(composite(stack)))
    for layer in stack.layers:
        (x, y), opacity = layer.offset, round(layer.opacity * 255)
        record = document.create_pixel_layer(layer.image, top=y, left=x, opacity=opacity)
        record.name = layer.name  # given above, a name beyond Mac Roman could not be written
        record.visible = layer.visible
    # The documented low level: `save` would draw the merged image again or warn that it cannot. A negative count says
    # that the merged image's fourth channel is its transparency; otherwise Photoshop shows it as a saved selection.
    document._record.layer_and_mask_information.layer_info.layer_count = -len(stack.layers)
    with open(path, "wb") as file:
        document._record.write(file)


def is_psd(path: Path) -> bool:
    """Whether a file begins with the signature of PSD and PSB."""
    with open(path, "rb") as file:
        return file.read(4) == b"8BPS"


def read_psd(path: Path) -> LayerStack:
    """The pixel layers of a PSD or PSB, groups walked in their order.

    What a flat stack of 8-bit RGBA cannot hold is logged: texts, shapes and smart objects are read as they were last
    drawn, masks go into alpha, adjustments and fills are skipped, blending is read as normal, effects, clipping and
    vector masks are left out. A document without layers is one layer. Colours are converted to sRGB by its profile.

    Raises:
        RequestError: psd-tools is absent, or the document is damaged, too large or of an unsupported colour mode.
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
            check_size(document.size, str(path))
            sizes = [layer.width * layer.height for layer in document.descendants() if layer.kind in _PIXELS]
            if sum(sizes) > MAX_PIXELS:
                raise RequestError(f"{path} holds more than {MAX_PIXELS} pixels; make its layers smaller")
            notices: list[str] = []
            layers = tuple(_psd_layers(document, path, notices))
            if not layers:
                logger.warning("%s holds no layers of pixels; its whole image is read as one", path)
                image = _in_srgb(document.topil(apply_icc=False), document, path)
                layers = (Layer(image.convert("RGBA"), clean_name(path.stem)),)
            stack = LayerStack(document.size, layers)
            if not notices and _differs(stack, document, path):
                logger.warning(
                    "%s: the composite of its layers differs from its merged image; something in it is not read", path
                )
            return stack
    except QwenImageError:
        raise
    except Exception as error:  # the parser raises many kinds of errors on a damaged file
        raise RequestError(f"{path} cannot be read as a PSD: {str(error) or type(error).__name__}") from error


def _matte(merged: Image.Image) -> Image.Image:
    """Colours laid on white, with the alpha kept: how Photoshop stores a merged image, and undoes it on reading."""
    pixels = np.asarray(merged).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    pixels[..., :3] = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha))
    return Image.fromarray(pixels.astype(np.uint8))


def _psd_layers(
    group: Any, path: Path, notices: list[str], opacity: float = 1.0, shown: bool = True
) -> Iterator[Layer]:
    """Back to front, as psd-tools lists them; warnings about them go to the log and to `notices`."""

    def say(layer: str, notice: str) -> None:
        notices.append(notice)
        logger.warning("%s: layer %s %s", path, layer, notice)

    for layer in group:
        name = clean_name(layer.name)
        if layer.kind not in (*_GROUPS, *_PIXELS) or (layer.kind in _PIXELS and not layer.width * layer.height):
            say(f"{name} ({layer.kind})", "has no pixels and is skipped")
            continue
        for applies, notice in _PSD_NOTICES:
            if applies(layer):
                say(name, notice)
        own, visible = opacity * _psd_opacity(layer), shown and layer.visible
        if layer.kind in _GROUPS:
            yield from _psd_layers(layer, path, notices, own, visible)
            continue
        image = _rgba(layer, path)
        if image is None:
            say(f"{name} ({layer.kind})", "has no pixels and is skipped")
            continue
        if layer.has_mask():
            image.putalpha(ImageChops.multiply(image.getchannel("A"), _psd_mask(layer)))
        yield Layer(image, name, tuple(layer.offset), visible, own)


def _psd_opacity(layer: Any) -> float:
    """Opacity and Fill together: they differ for effects alone, which are left out."""
    return float(layer.opacity / 255 * (layer.fill_opacity / 255))


def _psd_mask(layer: Any) -> Image.Image:
    mask = layer.mask
    if mask.disabled:
        return Image.new("L", layer.size, 255)
    whole = Image.new("L", layer.size, mask.background_color)
    drawn = mask.topil()
    if drawn is not None:
        whole.paste(drawn.convert("L"), (mask.left - layer.left, mask.top - layer.top))
    densities = (_mask_field(layer, f"{kind}_mask_density") for kind in ("user", "vector"))
    share = next((density / 255 for density in densities if density is not None), 1)
    return whole.point(lambda value: round(255 - share * (255 - value)))


def _mask_field(layer: Any, field: str) -> float | None:
    """A parameter of an enabled mask; None without one."""
    parameters = None if layer.mask is None or layer.mask.disabled else layer.mask.parameters
    return getattr(parameters, field, None)


def _is_cut(layer: Any) -> bool:
    """Whether a layer has a vector mask that is applied neither to its pixels nor to its drawn mask."""
    vector, mask = layer.vector_mask, layer.mask
    return layer.kind != "shape" and vector is not None and not vector.disabled and not (mask and mask.has_real())


def _has_effects(layer: Any) -> bool:
    """Whether any effects are on, in the current block or that of Photoshop 5; unreadable ones count."""
    blocks = layer.tagged_blocks
    block = next((blocks[key].data for key in _PSD_EFFECTS if key in blocks), None)
    if block is None or isinstance(block, bytes):
        return block is not None
    if layer.has_effects() or any(getattr(effect, "enabled", False) for effect in block.values()):
        return True
    return _is_set(block, b"masterFXSwitch") and any(map(_is_on, block.values()))


def _is_on(effect: Any) -> bool:
    """Whether an effect, or one of a list of them, is present and on."""
    if isinstance(effect, Iterable) and not hasattr(effect, "get"):
        return any(map(_is_on, effect))
    return hasattr(effect, "get") and _is_set(effect, b"enab") and _is_set(effect, b"present")


def _is_set(descriptor: Any, key: bytes) -> bool:
    value = descriptor.get(key)
    return bool(getattr(value, "value", value))


def _blends_by_ranges(layer: Any) -> bool:
    ranges = layer._record.blending_ranges
    whole = [*(ranges.composite_ranges or ()), *(pair for pairs in ranges.channel_ranges or () for pair in pairs)]
    return any(tuple(pair) != _USUAL_RANGE for pair in whole)


def _differs(stack: LayerStack, document: Any, path: Path) -> bool:
    """Whether the composite of the layers differs from the document's merged image."""
    if not document.has_preview():
        return False
    shown = _in_srgb(document.topil(apply_icc=False), document, path).convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    pair = (Image.alpha_composite(white, image).convert("RGB") for image in (shown, composite(stack)))
    levels = np.asarray(ImageChops.difference(*pair)).max(-1)
    return bool((levels > _FAR).mean() > _MANY)


def _rgba(layer: Any, path: Path) -> Image.Image | None:
    """A layer's pixels, or None if it has none; psd-tools alone would lose the alpha of CMYK."""
    image, alpha = layer.topil(apply_icc=False), layer.topil(channel=_PSD_ALPHA)
    if image is None:
        return None
    image = _in_srgb(image, layer._psd, path).convert("RGBA")
    if alpha is not None:
        image.putalpha(alpha.convert("L"))
    return image


def _in_srgb(image: Image.Image, document: Any, path: Path) -> Image.Image:
    """By the document's profile; psd-tools alone would ignore a broken one."""
    return in_srgb(image, str(path), document.image_resources.get_data(_PSD_PROFILE))


def _blending(layer: Any) -> str:
    return str(layer.blend_mode.name).lower()
