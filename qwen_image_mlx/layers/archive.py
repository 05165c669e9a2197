"""Reads untrusted files that an index names, in a folder or a zip; writes zips.

Only files that lie in the folder or the archive can be named, nothing is unpacked to disk, and sizes are checked before
anything is decompressed or decoded.
"""

from __future__ import annotations

import io
import json
import logging
import lzma
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import RequestError
from ..files import is_from_macos
from ..images.files import METADATA_KEY
from ..images.sources import in_8_bits, readable
from .stack import MAX_PIXELS, Layer, check_size

logger: logging.Logger = logging.getLogger(__name__)

MAX_INDEX = 4 << 20
_MAX_FILE = 1 << 28  # of a PNG: more than any image of 8,000 pixels squared takes
_MAX_ARCHIVE = 4 << 30
_MAX_MEMBERS = 10_000
_ZIP_PIECE = 4096
_ZIP_TAIL = 22 + 0xFFFF  # the last bytes of an archive, with the place of its list of files
_ZIP_64 = b"PK\6\7"  # marks a list too long for an archive's usual fields
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError, ValueError)


class Files:
    """Files that an index may name: found by exact name among those listed, read whole, within limits."""

    def __init__(self, label: str, names: Collection[str], fetch: Callable[[str, int], bytes]) -> None:
        self.label = label
        self.names = names
        self._fetch = fetch
        self._pixels = MAX_PIXELS

    def read(self, name: str, limit: int = _MAX_FILE) -> bytes:
        """A file's bytes; raises RequestError if it is missing or longer than `limit`."""
        if name not in self.names:
            raise RequestError(f"{self.label} must hold {name!r:.200}, but lacks this file; put it there")
        return self._fetch(name, limit)

    def image(self, name: str) -> Image.Image:
        """A PNG file as RGBA in sRGB; raises RequestError if it is not one, or too large with those read before."""
        data, where = self.read(name), f"{name} in {self.label}"
        with readable(where, data, "PNG"), open_png(data) as image:
            check_size(image.size, where)
            self._pixels -= image.width * image.height
            if self._pixels < 0:
                raise RequestError(f"{self.label} holds more than {MAX_PIXELS} pixels; make its layers smaller")
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s is animated; its first frame is used", where)
            return in_8_bits(image, where).convert("RGBA")

    def layer(self, file: str, **fields: Any) -> Layer:
        """A PNG file as a layer with these fields; raises RequestError if it cannot be read or a field is wrong."""
        image = self.image(file)
        try:
            return Layer(image, **fields)
        except RequestError as error:
            raise RequestError(f"{file} in {self.label}: {error}") from error


@contextmanager
def open_png(data: bytes) -> Iterator[Image.Image]:
    """A PNG of any size; the caller has to check it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            yield image


def write_zip(files: Iterator[tuple[str, bytes]], path: Path) -> None:
    """Writes files as a zip, PNGs and `mimetype` stored; the same files give the same bytes. Raises OSError."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)  # of 1980: the day must not change the bytes
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            plain = name.endswith(".png") or name == "mimetype"
            info.compress_type = zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED
            archive.writestr(info, data)


@contextmanager
def zip_files(path: Path) -> Iterator[Files]:
    """The files of a zip; raises RequestError if it is damaged, or unpacks to too much."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = _unwrap({i.filename: i for i in archive.infolist() if _is_inside(i.filename)})
            if len(members) > _MAX_MEMBERS or sum(info.file_size for info in members.values()) > _MAX_ARCHIVE:
                raise RequestError(f"{path} unpacks to more than {_MAX_ARCHIVE >> 30} GB; this is not a layered image")

            def fetch(name: str, limit: int) -> bytes:
                if members[name].file_size > limit:  # zipfile never gives more than this size
                    raise RequestError(
                        f"{name} in {path} is longer than {limit} bytes; this is not a layer of an image"
                    )
                with archive.open(members[name]) as file:  # in pieces, to bound the memory of unpacking
                    return b"".join(iter(lambda: file.read(_ZIP_PIECE), b""))

            yield Files(str(path), members, fetch)
    except RequestError:
        raise
    except _ZIP_ERRORS as error:
        raise RequestError(f"{path} cannot be read: {error}") from error


def _check_directory(path: Path) -> None:
    """Raises RequestError if the list of files is too long; OSError if the file cannot be read."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _ZIP_TAIL))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    nbytes = int.from_bytes(tail[place + 12 : place + 16], "little")
    if place >= 0 and (nbytes > MAX_INDEX or tail[max(0, place - 20) : place].startswith(_ZIP_64)):
        raise RequestError(f"{path} holds more than {_MAX_MEMBERS:,} files; this is not a layered image")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name)


def _unwrap(members: dict[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """An archive's files without the one folder around them all, and without the files that Finder adds to a zip."""
    paths = {name: PurePosixPath(name) for name in members if not name.endswith("/")}
    own = [
        n for n, path in paths.items() if path.parts and path.parts[0] != "__MACOSX" and not is_from_macos(path.name)
    ]
    if len({paths[name].parts[0] for name in own}) != 1 or any(len(paths[name].parts) == 1 for name in own):
        return {name: members[name] for name in own}
    return {str(PurePosixPath(*paths[name].parts[1:])): members[name] for name in own}


def json_bytes(value: dict[str, Any]) -> bytes:
    """A value as JSON bytes, UTF-8; raises RequestError if it cannot be written as JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the metadata cannot be written as JSON: {error}; give numbers, text, lists") from error


def png_bytes(image: Image.Image, metadata: dict[str, Any] | None = None) -> bytes:
    """An image as the bytes of a PNG, with metadata stored by `images.files`; raises RequestError if it is not JSON."""
    info = PngImagePlugin.PngInfo()
    if metadata:
        info.add_itxt(METADATA_KEY, json_bytes(metadata).decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
