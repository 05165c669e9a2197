"""PNG files: written whole or not at all, never over another, and carrying what made them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import OutputError, RequestError
from ..names import StrPath
from ..outside import why_not_read
from ..unfinished import hidden, publish, sweep
from .formats import MOST_BYTES

logger: logging.Logger = logging.getLogger(__name__)

METADATA_KEY = "qwen_image_mlx"
DEFAULT_NAME = "qwen-image.png"
_FREE_MARGIN = 1 << 20
_NAME_BYTES = 200  # most file systems take 255; a number may be added


def output_path(output: str | None, default_name: str = DEFAULT_NAME) -> Path:
    """The PNG a user's --output means: a file, or a directory to put `default_name` in; raises RequestError."""
    if output is None:
        return Path(default_name)
    path = named_path(output, "--output")
    if path.is_dir():
        return path / default_name
    if output.endswith(("/", os.sep)):
        return path / default_name
    if path.name.lower() == ".png":
        raise RequestError(f"--output is {output}, which has no name before .png; name it, as in fox.png")
    if not path.suffix:
        return path.with_name(path.name + ".png")
    if path.suffix.lower() != ".png":
        raise RequestError(f"--output is {output}, but pictures are written as PNG; end the name in .png")
    return path


def named_path(name: StrPath, what: str) -> Path:
    """The path that a person's words mean, whether something is there or not, with ~ expanded.

    Args:
        name: as it was given.
        what: how the message calls it.

    Raises:
        RequestError: it is empty, or nothing can ever have this name.
    """
    if not os.fspath(name):
        raise RequestError(f"{what} is empty: name a place")
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise RequestError(f"{what} is {str(name)!r:.80}, which leads nowhere: {why}") from error
    return path


def check_text(metadata: Any) -> None:
    """Raises RequestError, before any work is done, for names of files that a PNG could not record."""
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "a file's name is not valid text, so no picture could say that it was made from it"
        ) from error


def check_writable(path: Path, nbytes: int) -> None:
    """Raises OutputError, before any work is done, if `nbytes` could not be written to `path` now.

    Removes what runs that were killed left in its folder.
    """
    folder = path.parent
    for place in (folder, Path(tempfile.gettempdir())):
        sweep(place)
    try:
        path.exists()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if len(os.fsencode(path.name)) > _NAME_BYTES:
            raise OutputError(f"cannot write {path.name[:40]}…: the name is too long")
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {reason(error)}") from error
    if free < nbytes + _FREE_MARGIN:
        raise OutputError(f"cannot write {path}: the disk has {free / 1e6:.1f} MB left; free some space")


def encode_png(image: Image.Image, metadata: dict[str, Any] | None = None) -> bytes:
    """A picture as the bytes of a PNG, with its metadata if it has any; the arguments are those of `save_png`."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


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
    written = new_file(path, encode_png(image, metadata))
    if written != path:
        logger.warning("%s exists already; saved as %s", path, written.name)
    return written


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata `save_png` stored; raises RequestError if the file is no such picture."""
    try:
        if why := why_not_read(path, MOST_BYTES):
            raise RequestError(f"{path} is not a readable picture: {why}")
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except RequestError:
        raise
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(getattr(error, "strerror", None) or error)
        raise RequestError(f"{path} is not a readable picture: {why}") from error
    try:
        metadata = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise RequestError(f"{path} carries no parameters of qwen-image-mlx; only its own PNG files do")
    return metadata


def new_file(path: Path, data: bytes) -> Path:
    """Writes a file, whole or not at all, under `path` or the first free `-1`, `-2`, … beside it.

    Missing folders are made. Returns the path written; raises OutputError, and nothing is left behind.
    """
    partial = hidden(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        return publish(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        _forget(partial)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file in place of an old one, atomically; raises OutputError, and the old one stays."""
    partial = hidden(path)
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        _forget(partial)


def _forget(partial: Path) -> None:
    with suppress(OSError):  # a folder that is gone or not ours was said already
        partial.unlink()


def is_from_macos(name: str) -> bool:
    """Whether a file is one that macOS puts beside others: attributes of a file (`._NAME`) or of a folder's window."""
    return name == ".DS_Store" or name.startswith("._")


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
