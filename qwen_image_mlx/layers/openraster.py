"""Layers as OpenRaster files, both ways.

By https://www.openraster.org/baseline/file-layout-spec.html and layer-stack-spec.html.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..errors import RequestError
from ..images.files import record_of
from ..images.sources import readable
from .archive import MAX_INDEX, Files, open_png, png_bytes, zip_files
from .stack import MAX_LAYERS, Layer, LayerStack, clean_name, composite

logger: logging.Logger = logging.getLogger(__name__)

ORA_TYPE = b"image/openraster"
_ORA_LIMITS = re.compile("alpha|clip|fill|inherit|mask|effect", re.IGNORECASE)  # programs' own: the standard has none
_ORA_OFF = ("", "0", "false", "no", "none", "off")
_THUMBNAIL_SIDE = 256
_MAX_DEPTH = 100


def ora_files(stack: LayerStack) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of an OpenRaster archive's files in order; metadata is in mergedimage.png, stored as in our PNGs.

    Raises:
        RequestError: the metadata cannot be written as JSON.
    """
    width, height = stack.size
    image = ElementTree.Element("image", version="0.0.3", w=str(width), h=str(height), xres="72", yres="72")
    root = ElementTree.SubElement(image, "stack")
    for number, layer in reversed(list(enumerate(stack.layers))):  # stack.xml goes from front to back
        ElementTree.SubElement(root, "layer", {
            "name": layer.name, "src": f"data/layer{number}.png", "x": str(layer.offset[0]), "y": str(layer.offset[1]),
            "opacity": np.format_float_positional(layer.opacity, trim="0"),
            "visibility": "visible" if layer.visible else "hidden", "composite-op": "svg:src-over",
        })  # fmt: skip
    yield "mimetype", ORA_TYPE
    yield "stack.xml", ElementTree.tostring(image, "UTF-8", xml_declaration=True)
    for number, layer in enumerate(stack.layers):
        yield f"data/layer{number}.png", png_bytes(layer.image)
    merged = composite(stack)
    yield "mergedimage.png", png_bytes(merged, stack.metadata)
    merged.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    yield "Thumbnails/thumbnail.png", png_bytes(merged)


def read_ora(path: Path) -> LayerStack:
    """The layers of an OpenRaster file, nested stacks flattened.

    What a flat stack cannot hold is logged: filters and texts are skipped, blending is read as normal, a nested stack's
    opacity goes to each of its layers, masks and clipping of other programs are left out.

    Raises:
        RequestError: it is damaged, too large, or unsafe.
    """
    with zip_files(path) as files:
        root = _xml(files)
        stack = root.find("stack")
        layers = [] if stack is None else list(islice(_ora_layers(stack, files), MAX_LAYERS + 1))
        if not layers:
            raise RequestError(f"{path} holds no layers")
        size = tuple(_attribute(root, key, None, int, files) for key in "wh")
        return LayerStack(size, tuple(reversed(layers)), _ora_metadata(files))


def is_ora(path: Path) -> bool:
    """Whether a file is a zip whose mimetype is OpenRaster's."""
    if not zipfile.is_zipfile(path):
        return False
    with zip_files(path) as files:
        return "mimetype" in files.names and files.read("mimetype", 1000).strip() == ORA_TYPE


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity, before one is expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise RequestError("it has a document type, which a layered image does not need")


def _xml(files: Files) -> ElementTree.Element:
    data = files.read("stack.xml", MAX_INDEX)
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise RequestError(f"stack.xml in {files.label} cannot be read: {error}") from error
    if root.tag != "image":
        raise RequestError(f"stack.xml in {files.label} holds <{root.tag!s:.80}>, but must hold <image>")
    return root


def _ora_layers(
    stack: ElementTree.Element,
    files: Files,
    x: int = 0,
    y: int = 0,
    opacity: float = 1.0,
    visible: bool = True,
    depth: int = 0,
) -> Iterator[Layer]:
    """Front to back; offsets of nested stacks add up, as drafts before 0.0.5 had them."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"stack.xml in {files.label} nests stacks deeper than {_MAX_DEPTH}; flatten it")
    for element in stack:
        name = clean_name(element.get("name", ""))
        if element.tag not in ("stack", "layer") or not element.get("src", ".png").lower().endswith(".png"):
            logger.warning("%s: %s %s is not a pixel layer; it is skipped", files.label, element.tag, name)
            continue
        if (blending := element.get("composite-op", "svg:src-over")) != "svg:src-over":
            logger.warning("%s: %s is blended with %s; it is read as normal", files.label, name, blending)
        if unread := [
            key for key, value in element.items() if _ORA_LIMITS.search(key) and value.lower() not in _ORA_OFF
        ]:
            logger.warning("%s: %s has %s, which is left out", files.label, name, ", ".join(sorted(unread)))
        if element.tag == "layer" and len(element):
            logger.warning("%s: %s has <%s>, which is left out", files.label, name, element[0].tag)
        own = _attribute(element, "opacity", 1.0, float, files)
        place = _attribute(element, "x", 0, int, files) + x, _attribute(element, "y", 0, int, files) + y
        is_visible = visible and element.get("visibility", "visible") != "hidden"
        if element.tag == "layer":
            file = element.get("src", "")
            yield files.layer(file, name=name, offset=place, visible=is_visible, opacity=opacity * own)
            continue
        if own < 1:
            logger.warning("%s: the opacity of stack %s is given to each of its layers", files.label, name)
        yield from _ora_layers(element, files, *place, opacity * own, is_visible, depth + 1)


def _attribute(element: ElementTree.Element, key: str, default: Any, kind: type, files: Files) -> Any:
    value = element.get(key, default)
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"stack.xml in {files.label} has {key}={value!r:.80} in <{element.tag}>, but needs a number"
        ) from error


def _ora_metadata(files: Files) -> dict[str, Any]:
    """The metadata that `ora_files` put into mergedimage.png; empty if a different program wrote the file since."""
    if "mergedimage.png" not in files.names:
        return {}
    try:
        data = files.read("mergedimage.png")
        with readable("mergedimage.png", data, "PNG"), open_png(data) as image:
            return record_of(image.info) or {}
    except RequestError:
        return {}
