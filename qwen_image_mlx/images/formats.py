"""The image formats that are read, and the messages about files in other ones."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

from PIL import Image

from ..errors import RequestError
from ..names import StrPath
from ..outside import why_not_read

# The formats Pillow may try; its others are of no use here, and some start other programs.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "ICO", "PSD",
)  # fmt: skip
READABLE = "PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF, JPEG 2000, and HEIC with pillow-heif"
# Suffixes of image files, in formats that are read.
_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
SUFFIXES = _HEIC_SUFFIXES | {
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".jp2",
}  # fmt: skip
# And in formats that are not read.
OTHER_SUFFIXES = frozenset({
    ".jxl", ".svg", ".psd", ".psb", ".xcf", ".kra", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
    ".exr", ".hdr", ".pdf",
})  # fmt: skip
MOST_BYTES = 1 << 30  # of an image's file
_HEAD = 4096  # bytes of a file that identify its format
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_CONVERT = "convert it to PNG or JPEG"
_HEIC_CURE = "on a Mac `sips -s format jpeg PHOTO.heic --out PHOTO.jpg` makes a JPEG of it"


class _Foreign(NamedTuple):
    """A format that is not read: bytes at a place in its files, its name, and the cure."""

    place: int
    begins: bytes
    name: str
    cure: str = _CONVERT


_FOREIGN = (
    _Foreign(0, b"\xff\x0a", "a JPEG XL image"),
    _Foreign(4, b"JXL ", "a JPEG XL image"),
    _Foreign(0, b"%PDF", "a PDF", "export the page as PNG"),
    _Foreign(0, b"%!PS", "PostScript", "export it as PNG"),
    _Foreign(0, b"<svg", "an SVG drawing", "export it as PNG"),
    _Foreign(0, b"<?xml", "an XML file, perhaps an SVG drawing", "export it as PNG"),
    _Foreign(0, b"<!DOCTYPE html", "a web page", "save the image itself"),
    _Foreign(0, b"<html", "a web page", "save the image itself"),
    _Foreign(0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with `git lfs pull`"),
    _Foreign(0, b"gimp xcf", "a GIMP document", "export it as PNG"),
    _Foreign(0, b"\x00\x05\x16\x07", "a file of attributes that macOS keeps for a file on a foreign disk (AppleDouble)",
             "give the file without the ._ before its name"),
    _Foreign(4, b"ftypcrx", "a Canon raw photo", "develop it and export a JPEG or TIFF"),
    _Foreign(0, b"FUJIFILMCCD-RAW", "a Fujifilm raw photo", "develop it and export a JPEG or TIFF"),
    _Foreign(4, b"ftyp", "a video", "export a frame as PNG"),
    _Foreign(0, b"\x1a\x45\xdf\xa3", "a video", "export a frame as PNG"),
    _Foreign(0, b"v/1\x01", "an OpenEXR image"),
    _Foreign(0, b"DDS ", "a DDS texture"),
    _Foreign(0, b"PK\x03\x04", "a zip or a document", "give an image"),
)  # fmt: skip


def formats() -> list[str]:
    """Pillow's names of the formats it reads here; HEIF where pillow-heif is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN and find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def unread_suffixes() -> frozenset[str]:
    """Suffixes of image files in formats that are not read here."""
    return OTHER_SUFFIXES if "HEIF" in formats() else OTHER_SUFFIXES | _HEIC_SUFFIXES


def check_file(path: StrPath, name: str, most: int = MOST_BYTES) -> None:
    """Raises RequestError unless a path is a regular file of bounded size, and OSError if it does not exist."""
    if not os.fspath(path):
        raise RequestError("the image's name is empty: give a file")
    if os.fspath(path).startswith(("http://", "https://")):
        raise RequestError(f"{name} is an address: download the file first and give its path")
    if os.fspath(path).startswith("file://"):
        raise RequestError(f"{name} is an address: give the path alone, without file://")
    if os.path.isdir(path):
        raise RequestError(f"{name} is a folder: give a file")
    if why := why_not_read(path, most):
        raise RequestError(f"{name} cannot be read as an image: {why}")


def unreadable(source: StrPath | bytes, name: str, taken: str = READABLE) -> str:
    """The sentence for a file that Pillow does not recognise: its format, if known, and the cure.

    Args:
        source: a path, or a file's bytes.
        name: its name in the message.
        taken: the formats that are read, as the message lists them.
    """
    head = _head(source)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        cure = f"pip install pillow-heif, or convert it: {_HEIC_CURE}" if taken == READABLE else _HEIC_CURE
        return f"{name} is a HEIC image, which is not read here: {cure}"
    if not head:
        return f"{name} is empty"
    for format in _FOREIGN:
        place = head.lstrip(b"\xef\xbb\xbf \t\r\n") if format.begins.startswith(b"<") else head
        if place[format.place :].lower().startswith(format.begins.lower()):
            return f"{name} is {format.name}, which is not read: {format.cure}"
    return f"{name} is not an image in a format that can be read ({taken})"


def _head(source: StrPath | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:_HEAD]
    try:
        with open(source, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""
