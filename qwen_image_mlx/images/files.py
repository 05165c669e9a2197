"""Image files that carry the parameters that made them: formats, records, names."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from ..errors import OutputError, RequestError
from ..files import new_file
from ..names import StrPath
from .colour import alpha_range
from .formats import check_file
from .sources import readable

logger: logging.Logger = logging.getLogger(__name__)

METADATA_KEY = "qwen_image_mlx"
# By suffix: the format of an image, and how it is written.
_LOSSY = {"quality": 95, "subsampling": 0}
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", _LOSSY),
    ".jpeg": ("JPEG", _LOSSY),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
}
OPAQUE = (".jpg", ".jpeg")  # without transparency
_COMMENT = b"ASCII\0\0\0"  # which code EXIF's UserComment is in
_JPEG_COMMENT = 60_000  # bytes; EXIF is one segment of a JPEG
_MAX_RECORD = 8_000_000  # characters: several prompts of the maximum length


def check_text(metadata: Any) -> None:
    """Raises RequestError, before any work is done, for file names that a PNG could not record."""
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError("a file's name is not valid text, so no image could say that it was made from it") from error


def encode_png(image: Image.Image, metadata: dict[str, Any] | None = None) -> bytes:
    """An image as the bytes of a PNG, with its metadata, a JSON-serialisable dict, if there is any."""
    info = PngImagePlugin.PngInfo() if metadata is None else _png_info(json.dumps(metadata, ensure_ascii=False))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _png_info(record: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, record)
    return info


def _comment(metadata: dict[str, Any]) -> bytes:
    return _COMMENT + json.dumps({METADATA_KEY: metadata}).encode()


def _exif(comment: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def encode_image(image: Image.Image, metadata: dict[str, Any], path: Path) -> bytes:
    """An image as the bytes of a file of that name, with its metadata.

    Args:
        image: RGB or RGBA.
        metadata: JSON-serialisable; in a JPEG and a WebP it is EXIF's UserComment.
        path: ends in .png; .webp, which is without loss; .jpg or .jpeg, of quality 95.

    Raises:
        OutputError: it has transparency or a record that a JPEG cannot hold.
    """
    form, settings = WRITERS[path.suffix.lower()]
    if form == "PNG":
        return encode_png(image, metadata)
    comment, file = _comment(metadata), io.BytesIO()
    if form == "JPEG" and image.mode == "RGBA" and alpha_range(image)[0] == 255:
        image = image.convert("RGB")
    if form == "JPEG" and image.has_transparency_data:
        raise OutputError(f"cannot write {path}: JPEG has no transparency, which this image has; end in .png or .webp")
    if form == "JPEG" and len(comment) > _JPEG_COMMENT:
        raise OutputError(f"cannot write {path}: its record is too long for a JPEG; end the name in .png or .webp")
    image.save(file, form, exif=_exif(comment), **settings)
    return file.getvalue()


class RecordedImage(Image.Image):
    """An image that keeps its record, JSON in `info["qwen_image_mlx"]`, when it is saved as PNG, JPEG or WebP."""

    def __eq__(self, other: object) -> bool:
        """Whether the other is an image of the same pixels, whatever its record."""
        if not isinstance(other, Image.Image):
            return NotImplemented
        return (self.mode, self.size) == (other.mode, other.size) and self.tobytes() == other.tobytes()

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Pillow's `save`, which also writes the record unless `pnginfo` or `exif` is given."""
        name = str(getattr(fp, "name", fp)) if format is None else f"x.{format}"
        form, _ = WRITERS.get(Path(name).suffix.lower(), ("", {}))
        text = self.info.get(METADATA_KEY)
        if isinstance(text, str) and form == "PNG" and "pnginfo" not in params:
            params["pnginfo"] = _png_info(text)
        elif isinstance(text, str) and form and "exif" not in params:
            comment = _comment(json.loads(text))
            if form != "JPEG" or len(comment) <= _JPEG_COMMENT:
                params["exif"] = _exif(comment)
        super().save(fp, format, **params)


def with_record(image: Image.Image, metadata: dict[str, Any]) -> RecordedImage:
    """The image, with its record."""
    carrier = RecordedImage()
    carrier.__setstate__(image.__getstate__())
    carrier.info[METADATA_KEY] = json.dumps(metadata, ensure_ascii=False)
    return carrier


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> Path:
    """Writes an image as `save_image` does, but always as a PNG, whatever the suffix."""
    return _save(path, encode_png(image, metadata))


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> Path:
    """Writes an image with its metadata, atomically, under `path` or the first free name with `-1`, `-2`, ….

    Args:
        image: the image.
        path: the file, whose suffix decides the format; missing folders are made.
        metadata: JSON-serialisable; in a PNG stored as UTF-8 text under the key `qwen_image_mlx`.

    Returns:
        The path written.

    Raises:
        OutputError: it could not be written; nothing is left behind.
    """
    return _save(path, encode_image(image, metadata, path))


def _save(path: Path, data: bytes) -> Path:
    written = new_file(path, data)
    if written != path:
        logger.warning("%s exists already; saved as %s", path, written.name)
    return written


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata `save_image` stored; raises RequestError if the file has none."""
    with readable(str(path), path, "PNG, JPEG or WebP"):
        check_file(path, str(path))
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            metadata = record_of(getattr(image, "text", {})) if image.format == "PNG" else _read_comment(image)
    if metadata is None:
        raise RequestError(f"{path} carries no parameters of qwen-image-mlx; only its own images do")
    return metadata


def _read_comment(image: Image.Image) -> dict[str, Any] | None:
    """The record in EXIF's UserComment; None if it is absent, damaged, or too long to be ours."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_COMMENT) or len(comment) > _MAX_RECORD:
        return None
    value = _json(comment[len(_COMMENT) :])
    record = value.get(METADATA_KEY) if isinstance(value, dict) else None
    return record if isinstance(record, dict) else None


def record_of(texts: Mapping[Any, Any]) -> dict[str, Any] | None:
    """What `encode_png` stored among an image's texts; None if it is absent, damaged, or too long to be ours."""
    text = texts.get(METADATA_KEY)
    if not isinstance(text, str) or len(text) > _MAX_RECORD:
        return None
    record = _json(text)
    return record if isinstance(record, dict) else None


def _json(text: str | bytes) -> Any:
    """The JSON value of a text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
