"""Our own format of layers: PNG files and a manifest in a folder, or the same in a zip."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import OutputError, RequestError, some
from ..files import replace_file
from ..images.formats import OTHER_SUFFIXES, SUFFIXES
from ..images.geometry import Size
from .archive import MAX_INDEX, Files, json_bytes, png_bytes, zip_files
from .stack import MAX_LAYERS, Layer, LayerStack, check_size

logger: logging.Logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
ORDER = "back to front"
LAYER_FILE = re.compile(r"layer_(\d{1,9})\.png")

_NOT_LAYERS = ("composite.png", "contact_sheet.png")  # with every folder of layers
_LAYER_KEYS = ("name", "offset", "visible", "opacity")
_MANIFEST_KEYS = {"manifest_version": int, "size": list, "order": str, "layers": list}


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
        raise RequestError(f"the metadata has {taken[0]!r}, which is one of the manifest's own keys; rename it")
    for number, layer in enumerate(stack.layers):
        name = f"layer_{number}.png"
        yield name, png_bytes(layer.image)
        manifest["layers"].append({
            "file": name, "name": layer.name, "size": list(layer.image.size), "offset": list(layer.offset),
            "visible": layer.visible, "opacity": layer.opacity,
        })  # fmt: skip
    yield MANIFEST, json_bytes(manifest | stack.metadata)


def write_folder(files: Iterator[tuple[str, bytes]], folder: Path) -> None:
    """Writes files into an existing folder; raises OSError."""
    for name, data in files:
        (folder / name).write_bytes(data)


def read_folder(path: Path) -> LayerStack:
    """The layers of a folder; without a manifest its layer_N.png in the order of their numbers. Raises RequestError."""

    def fetch(name: str, limit: int) -> bytes:
        with open(path / name, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise RequestError(f"{name} in {path} is longer than {limit} bytes; this is not a layer of an image")
        return data

    try:
        home = path.resolve()
        names = {e.name for e in os.scandir(path) if e.is_file() and Path(e.path).resolve().parent == home}
        _warn_ignored(str(path), names)
        return _layers(Files(str(path), names, fetch))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error


def _warn_ignored(label: str, names: Collection[str]) -> None:
    """Warns about images not named as layers, in a folder without a manifest."""
    layers = _in_order(names)
    if MANIFEST in names or not layers:
        return
    images = (name for name in names if Path(name).suffix.lower() in SUFFIXES | OTHER_SUFFIXES)
    if others := sorted({name for name in images if not name.startswith(".")} - {*layers, *_NOT_LAYERS}):
        logger.warning("%s: %s are not named layer_N.png and are left out", label, some(others))


def is_folder_of_layers(folder: Path) -> bool:
    """Whether a folder has a manifest, or files named as layers (layer_N.png)."""
    names = os.listdir(folder)
    return MANIFEST in names or bool(_in_order(names))


def layer_names(folder: Path) -> list[str]:
    """The names of a folder's layers, back to front; `read_folder` must be able to read it."""
    if (folder / MANIFEST).is_file():
        return [entry["file"] for entry in json.loads((folder / MANIFEST).read_bytes())["layers"]]
    return _in_order(os.listdir(folder))


def _in_order(names: Iterable[str]) -> list[str]:
    """Those that are layer_N.png, by N."""
    return [name for _, name in sorted((int(m[1]), m[0]) for m in map(LAYER_FILE.fullmatch, names) if m)]


def adopt_file(folder: Path, index: int, name: str, size: Size) -> None:
    """Records a PNG in the manifest as the new image of a layer. Raises OutputError."""
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
    with zip_files(path) as files:
        return _layers(files)


def _layers(files: Files) -> LayerStack:
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


def _manifest(files: Files) -> dict[str, Any]:
    where = f"{MANIFEST} in {files.label}"
    data = files.read(MANIFEST, MAX_INDEX)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
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


def _entry(entry: Any, canvas: list[int], files: Files) -> Layer:
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
