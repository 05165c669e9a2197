"""Layers on disk: the table of formats, saving them together or not at all, loading by content.

A format is a row of `FORMATS`, and has a module of this room that writes and reads it. A folder of layers is written
once and never over anything.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ..errors import OutputError, RequestError
from ..files import atomic_folder, reason
from ..names import LayersFormat, StrPath
from ..outside import why_not_read
from . import folder as own
from . import openraster, pptx, psd
from .archive import write_zip
from .libraries import library
from .stack import LayerStack, composite, contact_sheet

logger: logging.Logger = logging.getLogger(__name__)

_MAX_FILE = 2 << 30  # bytes; a PSD may not have more, by its specification


@dataclass(frozen=True)
class Format:
    """How a stack is stored on disk.

    Attributes:
        file: name of its file in the directory; "" for the directory itself.
        write: writes it to a path, which is a directory if `file` is "".
        read: reads it from a path, or None.
        recognises: whether an existing path is of this format.
        library: module that writing and reading need.
    """

    file: str
    write: Callable[[LayerStack, Path], None]
    read: Callable[[Path], LayerStack] | None = None
    recognises: Callable[[Path], bool] = lambda path: False
    library: str | None = None


# In the order in which a file is tried.
FORMATS: dict[str, Format] = {
    "png": Format(
        "",
        lambda stack, path: own.write_folder(own.folder_files(stack), path),
        own.read_folder,
        Path.is_dir,
    ),
    "psd": Format("layers.psd", psd.write_psd, psd.read_psd, psd.is_psd, "psd_tools"),
    "ora": Format(
        "layers.ora",
        lambda stack, path: write_zip(openraster.ora_files(stack), path),
        openraster.read_ora,
        openraster.is_ora,
    ),
    "zip": Format(
        "layers.zip",
        lambda stack, path: write_zip(own.folder_files(stack), path),
        own.read_zip,
        zipfile.is_zipfile,
    ),
    "pptx": Format("layers.pptx", pptx.write_pptx, library="pptx"),
}
READABLE = "a folder that decompose wrote, its zip, a PSD or an OpenRaster file"


def check_formats(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once; raises RequestError for one that is not a format or whose library is not installed."""
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"formats are {names!r:.80}, but must be some of {', '.join(FORMATS)}")
    names = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise RequestError(
            f"{', '.join(map(repr, unknown)) or 'nothing'} is not a format of layers; give some of {', '.join(FORMATS)}"
        )
    for name in names:
        if needed := FORMATS[name].library:
            library(needed, f"writing {name}")
    return names


def save_layers(stack: LayerStack, folder: StrPath, formats: Iterable[LayersFormat] = ("png",)) -> list[Path]:
    """Writes layers in one or more formats, with the image they make and a contact sheet.

    Args:
        stack: the layers.
        folder: made if it is missing, empty if it is not.
        formats: keys of `FORMATS`.

    Returns:
        The files, `composite.png` and `contact_sheet.png` among them.

    Raises:
        RequestError: a format is unknown, or its library is not installed.
        OutputError: the folder is not empty or cannot be written; nothing is left behind.
    """
    chosen = check_formats(formats)
    if not isinstance(folder, str | os.PathLike) or "\0" in os.fspath(folder):
        raise RequestError(f"the folder is {folder!r:.80}, but must be a path")
    folder = Path(os.path.expanduser(folder))
    try:
        if not is_free(folder):
            raise FileExistsError(errno.EEXIST, "it exists already; give a new or empty folder")
        with atomic_folder(folder) as partial:
            for name in chosen:
                FORMATS[name].write(stack, partial / FORMATS[name].file)
            composite(stack).save(partial / "composite.png")
            contact_sheet(stack).save(partial / "contact_sheet.png")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {reason(error)}") from error
    return sorted(folder.iterdir())


def free_folder(folder: Path) -> Path:
    """The folder, or the first free name with `-1`, `-2`, …; raises RequestError if a file has its name."""
    if folder.is_file():
        raise RequestError(f"{folder} is a file; give a new folder")
    if is_free(folder):
        return folder
    free = next(place for n in count(1) if is_free(place := folder.with_name(f"{folder.name}-{n}")))
    logger.warning("%s exists already; saved as %s", folder, free.name)
    return free


def is_free(folder: Path) -> bool:
    """Whether the path does not exist or is an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()))


def is_layers(path: Path) -> bool:
    """Whether an existing path looks like one that `load_layers` reads."""
    return own.is_folder_of_layers(path) if path.is_dir() else _format_of(path) is not None


def load_layers(path: StrPath) -> LayerStack:
    """The layers of a folder, a zip, a PSD or an OpenRaster file, identified by content.

    Raises:
        RequestError: the file does not exist, holds no layers, or is damaged, too large or unsafe.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise RequestError(f"{path} does not exist; give {READABLE}")
    found = _format_of(path)
    if found is None or found.read is None:
        raise RequestError(f"{path} holds no layers that can be read; give {READABLE}")
    if not path.is_dir() and (why := why_not_read(path, _MAX_FILE)):
        raise RequestError(f"{path} cannot be read: {why}")
    return found.read(path)


def _format_of(path: Path) -> Format | None:
    try:
        if not path.is_dir() and (why := why_not_read(path)):
            raise RequestError(f"{path} cannot be read: {why}")
        return next((f for f in FORMATS.values() if f.read is not None and f.recognises(path)), None)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {reason(error)}") from error


def split_reference(reference: str) -> tuple[Path, int | None]:
    """(path, layer) of PATH:N; (path, None) without a number, or if the whole is an existing path."""
    match = re.fullmatch(r"(.+):(\d{1,9})", reference)
    path, number = reference, None
    if match and not os.path.exists(os.path.expanduser(reference)):
        path, number = match[1], int(match[2])
    return Path(os.path.expanduser(path)), number
