"""Pictures on disk: written whole or not at all, never over another, and carrying what made them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import OutputError, RequestError
from .pixels import on_white

logger = logging.getLogger(__name__)

ImageSource = Image.Image | np.ndarray | str | os.PathLike | bytes

METADATA_KEY = "qwen_image_mlx"
DEFAULT_NAME = "qwen-image.png"
_FREE_MARGIN = 1 << 20


def output_path(output: str | None, default_name: str = DEFAULT_NAME) -> Path:
    """The PNG a user's --output means: a file, or a directory to put `default_name` in; raises RequestError."""
    if output is None:
        return Path(default_name)
    path = Path(output).expanduser()
    if output.endswith(("/", os.sep)) or path.is_dir():
        return path / default_name
    if not path.suffix:
        return path.with_name(path.name + ".png")
    if path.suffix.lower() != ".png":
        raise RequestError(f"--output is {output}, but pictures are written as PNG; end the name in .png")
    return path


def check_writable(path: Path, nbytes: int) -> None:
    """Raises OutputError, before any work is done, if `nbytes` could not be written to `path` now."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {reason(error)}") from error
    if free < nbytes + _FREE_MARGIN:
        raise OutputError(f"cannot write {path}: the disk has {free / 1e6:.1f} MB left; free some space")


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> Path:
    """Writes a PNG with its metadata, atomically, under `path` or the first free `-1`, `-2`, … beside it.

    Args:
        image: the picture.
        path: wanted file; missing folders are made.
        metadata: JSON-serialisable; stored as UTF-8 text under the key `qwen_image_mlx`.

    Returns:
        The path written.

    Raises:
        OutputError: it could not be written; nothing is left behind.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".", suffix=".png.partial", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, "PNG", pnginfo=info)
        os.chmod(partial, 0o666 & ~umask())
        written = _claim(path)
        os.replace(partial, written)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    if written != path:
        logger.warning("%s exists already; saved as %s", path, written.name)
    return written


def listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """Pictures as a list; a single one may be given without."""
    return [images] if isinstance(images, ImageSource) else list(images)


def open_image(source: ImageSource) -> Image.Image:
    """A picture as an upright RGB image: EXIF orientation applied, transparency laid on white, first frame only.

    Args:
        source: a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), a path, or a file's bytes.

    Raises:
        RequestError: it cannot be read, or is too large to be decoded safely.
    """
    image = _decoded(source)
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            logger.warning("%s has transparent parts; they are laid on white", _name(source))
    return on_white(image)


def open_rgba(source: ImageSource) -> Image.Image:
    """A picture as an upright RGBA image, opaque if it has no alpha; raises RequestError as `open_image` does."""
    return _decoded(source).convert("RGBA")


def open_transparency(source: ImageSource) -> Image.Image | None:
    """The opacity of a picture (mode L, upright), or None if it is opaque; raises RequestError as `open_image` does."""
    alpha = _decoded(source).convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def open_mask(source: ImageSource) -> Image.Image:
    """A mask as an upright picture; raises RequestError as `open_image` does."""
    return _decoded(source)


def _decoded(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if isinstance(source, np.ndarray):
        try:
            return Image.fromarray(source)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"an array {source.shape} of {source.dtype} is no picture; give uint8 of (height, width, 3 or 4)"
            ) from error
    name = _name(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s is animated; its first frame is used", name)
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise RequestError(f"there is no picture {name}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name} is too large to be opened safely; make it smaller") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} is not a picture in a format that can be read") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{name} cannot be read as a picture: {error}") from error


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "a picture"


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata `save_png` stored; raises RequestError if the file is no such picture."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"{path} is not a readable picture: {why}") from error
    try:
        metadata = json.loads(text) if text is not None else None
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise RequestError(f"{path} carries no parameters of qwen-image-mlx; only its own PNG files do")
    return metadata


def _claim(path: Path) -> Path:
    """Creates the first free name exclusively, so that two processes never take the same one."""
    for candidate in _candidates(path):
        try:
            os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: candidates never end")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    number = 0
    while True:
        number += 1
        yield path.with_stem(f"{path.stem}-{number}")


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file in place of an old one, atomically; raises OutputError, and the old one stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {reason(error)}") from error


def umask() -> int:
    """Permissions that new files are not given; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason(error: OSError) -> str:
    """Why, in lower case, for the end of a sentence."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()
