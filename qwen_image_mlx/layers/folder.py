"""Layers as PNG files beside an index: our folder with its manifest, the same in a zip, and OpenRaster.

Needs no library but Pillow. What is read is not trusted: only files that lie in the folder or the archive can be named,
nothing is unpacked to disk, and sizes are checked before anything is decompressed or decoded. OpenRaster by
https://www.openraster.org/baseline/file-layout-spec.html and layer-stack-spec.html.
"""

from __future__ import annotations

import io
import json
import logging
import lzma
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, PngImagePlugin

from ..errors import OutputError, RequestError, some
from ..images.files import METADATA_KEY, is_from_macos, record_of, replace_file
from ..images.formats import OTHER_SUFFIXES, SUFFIXES
from ..images.geometry import Size
from ..images.sources import in_8_bits, readable
from .stack import MAX_LAYERS, MAX_PIXELS, Layer, LayerStack, check_size, clean_name, composite

logger: logging.Logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
ORDER = "back to front"
LAYER_FILE = re.compile(r"layer_(\d{1,9})\.png")
ORA_TYPE = b"image/openraster"

_MADE_BESIDE = ("composite.png", "contact_sheet.png")  # with every folder of layers
_LAYER_KEYS = ("name", "offset", "visible", "opacity")
_MANIFEST_KEYS = {"manifest_version": int, "size": list, "order": str, "layers": list}
_ORA_LIMITS = re.compile("alpha|clip|fill|inherit|mask|effect", re.IGNORECASE)  # programs' own: the standard has none
_ORA_OFF = ("", "0", "false", "no", "none", "off")
_THUMBNAIL_SIDE = 256
_MAX_INDEX = 4 << 20
_MAX_FILE = 1 << 28  # of a PNG: more than 8,000 pixels squared take, however they look
_MAX_ARCHIVE = 4 << 30
_MAX_MEMBERS = 10_000
_MAX_DEPTH = 100
_ZIP_PIECE = 4096
_ZIP_TAIL = 22 + 0xFFFF  # bytes in which an archive says where its list of files is
_ZIP_64 = b"PK\6\7"  # what says that the list is longer than an archive's usual fields can tell
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError, ValueError)


class _Files:
    """Files that an index may name: found by exact name among those listed, read whole, within limits."""

    def __init__(self, label: str, names: Collection[str], fetch: Callable[[str, int], bytes]) -> None:
        self.label = label
        self.names = names
        self._fetch = fetch
        self._pixels = MAX_PIXELS

    def read(self, name: str, limit: int = _MAX_FILE) -> bytes:
        """A file's bytes; raises RequestError if it is not there or longer than `limit`."""
        if name not in self.names:
            raise RequestError(f"{self.label} must hold {name!r:.200}, but there is no such file in it; put it there")
        return self._fetch(name, limit)

    def picture(self, name: str) -> Image.Image:
        """A PNG file as RGBA in sRGB; raises RequestError if it is not one, or too large with those read before."""
        data, where = self.read(name), f"{name} in {self.label}"
        with readable(where, data, "PNG"), _opened(data) as image:
            check_size(image.size, where)
            self._pixels -= image.width * image.height
            if self._pixels < 0:
                raise RequestError(f"{self.label} holds more than {MAX_PIXELS} pixels; make its layers smaller")
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s is animated; its first frame is used", where)
            return in_8_bits(image, where).convert("RGBA")

    def layer(self, file: str, **fields: Any) -> Layer:
        """A PNG file as a layer with these fields; raises RequestError if it cannot be read or a field is wrong."""
        image = self.picture(file)
        try:
            return Layer(image, **fields)
        except RequestError as error:
            raise RequestError(f"{file} in {self.label}: {error}") from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A PNG of whatever size Pillow opens; the size is for the caller to check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            yield image


def folder_files(stack: LayerStack) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files of our folder format: `layer_0.png`, … from back to front, `manifest.json` last.

    Raises:
        RequestError: the metadata cannot be written as JSON, or uses one of the manifest's own keys.
    """
    manifest: dict[str, Any] = {
        "manifest_version": MANIFEST_VERSION,
        "size": list(stack.size),
        "order": ORDER,
        "layers": [],
    }
    if taken := sorted(manifest.keys() & stack.metadata.keys()):
        raise RequestError(f"the metadata has {taken[0]!r}, which is the manifest's own; name it otherwise")
    for number, layer in enumerate(stack.layers):
        name = f"layer_{number}.png"
        yield name, _png(layer.image)
        manifest["layers"].append({
            "file": name, "name": layer.name, "size": list(layer.image.size), "offset": list(layer.offset),
            "visible": layer.visible, "opacity": layer.opacity,
        })  # fmt: skip
    yield MANIFEST, _json(manifest | stack.metadata)


def ora_files(stack: LayerStack) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of an OpenRaster archive's files in order; metadata lies in mergedimage.png as in our PNGs.

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
        yield f"data/layer{number}.png", _png(layer.image)
    merged = composite(stack)
    yield "mergedimage.png", _png(merged, stack.metadata)
    merged.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    yield "Thumbnails/thumbnail.png", _png(merged)


def write_folder(files: Iterator[tuple[str, bytes]], folder: Path) -> None:
    """Writes files into an existing folder; raises OSError."""
    for name, data in files:
        (folder / name).write_bytes(data)


def write_zip(files: Iterator[tuple[str, bytes]], path: Path) -> None:
    """Writes files as a zip, PNGs and `mimetype` stored; the same files give the same bytes. Raises OSError."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)  # of 1980: the day must not change the bytes
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            plain = name.endswith(".png") or name == "mimetype"
            info.compress_type = zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED
            archive.writestr(info, data)


def read_folder(path: Path) -> LayerStack:
    """The layers of a folder; without a manifest its layer_N.png in the order of their numbers. Raises RequestError."""

    def fetch(name: str, limit: int) -> bytes:
        with open(path / name, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise RequestError(f"{name} in {path} is longer than {limit} bytes; this is no layer of a picture")
        return data

    try:
        home = path.resolve()
        names = {e.name for e in os.scandir(path) if e.is_file() and Path(e.path).resolve().parent == home}
        _say_what_is_passed_over(str(path), names)
        return _layers(_Files(str(path), names, fetch))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error


def _say_what_is_passed_over(label: str, names: Collection[str]) -> None:
    """Warns of images that look meant but are not named as layers, where no manifest says which are."""
    layers = _in_order(names)
    if MANIFEST in names or not layers:
        return
    images = (name for name in names if Path(name).suffix.lower() in SUFFIXES | OTHER_SUFFIXES)
    if others := sorted({name for name in images if not name.startswith(".")} - {*layers, *_MADE_BESIDE}):
        logger.warning("%s: %s are not named layer_N.png and are left out", label, some(others))


def is_folder_of_layers(folder: Path) -> bool:
    """Whether a folder has a manifest, or files named as layers."""
    names = os.listdir(folder)
    return MANIFEST in names or bool(_in_order(names))


def layer_names(folder: Path) -> list[str]:
    """The names of a folder's layers, back to front; of one that `read_folder` can read."""
    if (folder / MANIFEST).is_file():
        return [entry["file"] for entry in json.loads((folder / MANIFEST).read_bytes())["layers"]]
    return _in_order(os.listdir(folder))


def _in_order(names: Iterable[str]) -> list[str]:
    """Those that are layer_N.png, by N."""
    return [name for _, name in sorted((int(m[1]), m[0]) for m in map(LAYER_FILE.fullmatch, names) if m)]


def adopt_file(folder: Path, index: int, name: str, size: Size) -> None:
    """Makes a PNG in a folder a layer's own picture: the manifest names it from now on. Raises OutputError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["layers"][index] |= {"file": name, "size": list(size)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OutputError(
            f"{folder / name} is saved, but {MANIFEST} was changed meanwhile and cannot name it as layer {index}"
        ) from error
    replace_file(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=2).encode())


def read_zip(path: Path) -> LayerStack:
    """The layers of a zipped folder; raises RequestError."""
    with _zip_files(path) as files:
        return _layers(files)


def read_ora(path: Path) -> LayerStack:
    """The layers of an OpenRaster file, nested stacks flattened.

    What a flat stack cannot hold is logged: filters and texts are skipped, blending is read as normal, a nested stack's
    opacity goes to each of its layers, masks and clipping of other programs are left out.

    Raises:
        RequestError: it is damaged, too large, or unsafe.
    """
    with _zip_files(path) as files:
        root = _xml(files)
        stack = root.find("stack")
        layers = [] if stack is None else list(islice(_ora_layers(stack, files), MAX_LAYERS + 1))
        if not layers:
            raise RequestError(f"{path} holds no layers")
        size = tuple(_attribute(root, key, None, int, files) for key in "wh")
        return LayerStack(size, tuple(reversed(layers)), _ora_metadata(files))


def is_ora(path: Path) -> bool:
    """Whether a file is a zip that calls itself OpenRaster."""
    if not zipfile.is_zipfile(path):
        return False
    with _zip_files(path) as files:
        return "mimetype" in files.names and files.read("mimetype", 1000).strip() == ORA_TYPE


@contextmanager
def _zip_files(path: Path) -> Iterator[_Files]:
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = _unwrapped({i.filename: i for i in archive.infolist() if _is_inside(i.filename)})
            if len(members) > _MAX_MEMBERS or sum(info.file_size for info in members.values()) > _MAX_ARCHIVE:
                raise RequestError(f"{path} unpacks to more than {_MAX_ARCHIVE >> 30} GB; this is no layered picture")

            def fetch(name: str, limit: int) -> bytes:
                if members[name].file_size > limit:  # zipfile never gives more than this size
                    raise RequestError(f"{name} in {path} is longer than {limit} bytes; this is no layer of a picture")
                with archive.open(members[name]) as file:  # in pieces: what a piece unpacks to is in memory at once
                    return b"".join(iter(lambda: file.read(_ZIP_PIECE), b""))

            yield _Files(str(path), members, fetch)
    except RequestError:
        raise
    except _ZIP_ERRORS as error:
        raise RequestError(f"{path} cannot be read: {error}") from error


def _check_directory(path: Path) -> None:
    """Raises RequestError for a list of files that is too long to be read; OSError if the file cannot be read."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _ZIP_TAIL))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    nbytes = int.from_bytes(tail[place + 12 : place + 16], "little")
    if place >= 0 and (nbytes > _MAX_INDEX or tail[max(0, place - 20) : place].startswith(_ZIP_64)):
        raise RequestError(f"{path} holds more than {_MAX_MEMBERS:,} files; this is no layered picture")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name)


def _unwrapped(members: dict[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """An archive's files without the one folder that all lie in, and without what Finder adds, as it zips a folder."""
    paths = {name: PurePosixPath(name) for name in members if not name.endswith("/")}
    own = [
        n for n, path in paths.items() if path.parts and path.parts[0] != "__MACOSX" and not is_from_macos(path.name)
    ]
    if len({paths[name].parts[0] for name in own}) != 1 or any(len(paths[name].parts) == 1 for name in own):
        return {name: members[name] for name in own}
    return {str(PurePosixPath(*paths[name].parts[1:])): members[name] for name in own}


def _layers(files: _Files) -> LayerStack:
    if MANIFEST not in files.names:
        found = _in_order(files.names)
        if not found:
            raise RequestError(f"{files.label} holds neither {MANIFEST} nor layer_0.png")
        layers = tuple(files.layer(name, name=Path(name).stem) for name in found[: MAX_LAYERS + 1])
        if odd := [layer for layer in layers if layer.image.size != layers[0].image.size]:
            raise RequestError(
                f"{odd[0].name}.png in {files.label} is {odd[0].image.size} and {layers[0].name}.png "
                f"{layers[0].image.size}; without {MANIFEST} all must be of one size"
            )
        return LayerStack(layers[0].image.size, layers)
    manifest = _manifest(files)
    entries = manifest.pop("layers")
    if len(entries) > MAX_LAYERS:
        raise RequestError(f"{files.label} has {len(entries)} layers, but must have from 1 to {MAX_LAYERS}")
    layers = tuple(_entry(entry, manifest["size"], files) for entry in entries)
    return LayerStack(tuple(manifest["size"]), layers, {k: v for k, v in manifest.items() if k not in _MANIFEST_KEYS})


def _manifest(files: _Files) -> dict[str, Any]:
    where = f"{MANIFEST} in {files.label}"
    data = files.read(MANIFEST, _MAX_INDEX)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise RequestError(f"{where} is {type(manifest).__name__}, but must be an object")
    for key, kind in _MANIFEST_KEYS.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest[key], bool):
            raise RequestError(f"{where} has {key} {manifest.get(key)!r:.80}, but needs one of type {kind.__name__}")
    if manifest["manifest_version"] != MANIFEST_VERSION:
        raise RequestError(
            f"{where} has manifest_version {manifest['manifest_version']!r:.80}, but this release reads "
            f"{MANIFEST_VERSION}; update this program"
        )
    if manifest["order"] != ORDER:
        raise RequestError(f"{where} has order {manifest['order']!r:.80}, but must have {ORDER!r}")
    check_size(manifest["size"], where)
    return manifest


def _entry(entry: Any, canvas: list[int], files: _Files) -> Layer:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise RequestError(
            f"{MANIFEST} in {files.label} has a layer {entry!r:.80}, but each must be an object that names its file"
        )
    file, size = entry["file"], entry.get("size", canvas)
    layer = files.layer(file, **{key: entry[key] for key in _LAYER_KEYS if key in entry})
    if list(layer.image.size) != size:
        raise RequestError(
            f"{file} in {files.label} is {list(layer.image.size)} px, but {MANIFEST} says {size!r:.80}; correct one"
        )
    return layer


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity, before one is expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise RequestError("it has a document type, which a layered picture has no use for")


def _xml(files: _Files) -> ElementTree.Element:
    data = files.read("stack.xml", _MAX_INDEX)
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise RequestError(f"stack.xml in {files.label} cannot be read: {error}") from error
    if root.tag != "image":
        raise RequestError(f"stack.xml in {files.label} holds <{root.tag!s:.80}>, but must hold <image>")
    return root


def _ora_layers(
    stack: ElementTree.Element,
    files: _Files,
    x: int = 0,
    y: int = 0,
    opacity: float = 1.0,
    shown: bool = True,
    depth: int = 0,
) -> Iterator[Layer]:
    """Front to back; offsets of nested stacks add up, as drafts before 0.0.5 had them."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"stack.xml in {files.label} nests stacks deeper than {_MAX_DEPTH}; flatten it")
    for element in stack:
        name = clean_name(element.get("name", ""))
        if element.tag not in ("stack", "layer") or not element.get("src", ".png").lower().endswith(".png"):
            logger.warning("%s: %s %s is no layer of pixels; it is skipped", files.label, element.tag, name)
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
        visible = shown and element.get("visibility", "visible") != "hidden"
        if element.tag == "layer":
            file = element.get("src", "")
            yield files.layer(file, name=name, offset=place, visible=visible, opacity=opacity * own)
            continue
        if own < 1:
            logger.warning("%s: the opacity of stack %s is given to each of its layers", files.label, name)
        yield from _ora_layers(element, files, *place, opacity * own, visible, depth + 1)


def _attribute(element: ElementTree.Element, key: str, default: Any, kind: type, files: _Files) -> Any:
    value = element.get(key, default)
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"stack.xml in {files.label} has {key}={value!r:.80} in <{element.tag}>, but needs a number"
        ) from error


def _ora_metadata(files: _Files) -> dict[str, Any]:
    """What `ora_files` put into mergedimage.png; nothing if another program wrote it since."""
    if "mergedimage.png" not in files.names:
        return {}
    try:
        data = files.read("mergedimage.png")
        with readable("mergedimage.png", data, "PNG"), _opened(data) as image:
            return record_of(image.info) or {}
    except RequestError:
        return {}


def _json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the metadata cannot be written as JSON: {error}; give numbers, text, lists") from error


def _png(image: Image.Image, metadata: dict[str, Any] | None = None) -> bytes:
    info = PngImagePlugin.PngInfo()
    if metadata:
        info.add_itxt(METADATA_KEY, _json(metadata).decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
