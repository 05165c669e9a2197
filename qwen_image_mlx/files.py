"""Atomic writing of files and folders, hidden names while they are written, and paths that users give.

A result gets its final name when it is complete, in one step, and never overwrites anything. A process that is killed
leaves hidden files behind; each name contains the program, the machine and the process, so the next run in that folder
removes those of processes that have ended, and no others.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from .errors import OutputError, RequestError
from .names import StrPath

PREVIEW = b"tEXtqwen_image_mlx preview\0"  # begins the text in a preview's PNG that names its owner
PREVIEW_KEY = PREVIEW[4:-1].decode()
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_OWNER = r"(?P<host>[0-9a-f]{8})-(?P<pid>[1-9]\d{0,9})-(?P<run>[0-9a-f]{8})"
_HIDDEN = re.compile(rf"\..*\.{_OWNER}-\d+\.qwen-image-mlx(\.[a-z0-9]+)?", re.DOTALL)
_PREVIEW_NAME = re.compile(r".*-preview(-\d+)?\.png", re.DOTALL)
_HEAD = 300  # first bytes of a PNG, which identify a preview
_NAME_SHOWN = 30  # characters of at most four bytes each; a name may have 255 bytes
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_FREE_MARGIN = 1 << 20  # bytes of a disk that stay free
_NAME_BYTES = 200  # file systems usually allow 255; a number may be added
_run = os.urandom(4).hex()  # a later process may have the same number
_numbers = count()
_swept: set[str] = set()


def owner() -> str:
    """Identifies this machine, this process and this start of it, for a name."""
    return f"{_HOST}-{os.getpid()}-{_run}"


def hidden(path: Path) -> Path:
    """A new hidden name in `path`'s folder, with its suffix, for a file that becomes `path`; removes leftovers."""
    if (folder := os.path.abspath(path.parent)) not in _swept:
        _swept.add(folder)
        sweep(path.parent)
    ending = path.suffix if re.fullmatch(r"\.[a-z0-9]{1,20}", path.suffix) else ""
    return path.with_name(f".{path.name[:_NAME_SHOWN]}.{owner()}-{next(_numbers)}.qwen-image-mlx{ending}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A hidden name to write a file under; it takes the place of `path` when the `with` ends, whole or not at all.

    Raises:
        OSError: it could not be written; a file or folder at `path` stays, and nothing is left behind.
    """
    partial = hidden(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        _forget(partial)


@contextmanager
def atomic_folder(folder: Path, *, replacing: bool = False) -> Iterator[Path]:
    """A hidden folder to fill; it becomes `folder` when the `with` ends, whole or not at all.

    Args:
        folder: its parents are made.
        replacing: whether it may replace a folder that is not empty.

    Raises:
        OSError: it could not be written; a file or folder at `folder` stays, and nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = hidden(folder), hidden(folder)
    try:
        partial.mkdir(mode=0o700)
        yield partial
        partial.chmod(0o777 & ~umask())
        if replacing and folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        if old.exists() and not folder.exists():  # an error or Ctrl-C came between the two
            os.replace(old, folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Locks an existing folder for this process while the `with` lasts.

    Raises:
        BlockingIOError: another process has claimed it.
        OSError: it cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def new_file(path: Path, data: bytes) -> Path:
    """Writes a file, whole or not at all, under `path` or the first free name with `-1`, `-2`, ….

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
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error


def _forget(partial: Path) -> None:
    with suppress(OSError):  # a missing or unwritable folder was reported already
        partial.unlink()


def publish(partial: Path, path: Path) -> Path:
    """Gives a complete file its name, or the first free one with `-1`, `-2`, …; raises OSError, and the file stays."""
    for candidate in _candidates(path):
        try:
            os.link(partial, candidate)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _rename(partial, candidate):
                continue
        partial.unlink(missing_ok=True)
        return candidate
    raise AssertionError("unreachable: candidates never end")


def _rename(partial: Path, candidate: Path) -> bool:
    """For file systems without links: renames a file if the name is free; returns whether it was."""
    if os.path.lexists(candidate):
        return False
    try:
        os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(partial, candidate)
    except FileExistsError:
        return False
    except BaseException:  # Ctrl-C too, from when the name is taken: it would stay with nothing in it
        candidate.unlink(missing_ok=True)
        raise
    return True


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for number in count(1):
        yield path.with_stem(f"{path.stem}-{number}")


def sweep(folder: Path, *, alone: bool = False) -> None:
    """Removes what ended processes left in a folder: hidden files and folders, and previews. Raises nothing.

    Args:
        folder: the folder; its subfolders are left alone.
        alone: whether the caller knows that no other process on any machine writes here.
    """

    def is_left(entry: os.DirEntry[str]) -> bool:
        match = _HIDDEN.fullmatch(entry.name) or _match_preview(entry)
        return match is not None and (alone or _has_ended(match))

    _remove(folder, is_left)


def remove_previews(folder: Path) -> None:
    """Removes the previews that this process wrote to a folder, whatever their names. Raises nothing."""

    def is_own(entry: os.DirEntry[str]) -> bool:
        match = _match_preview(entry)
        return match is not None and match[0] == owner()

    _remove(folder, is_own)


def _remove(folder: Path, chosen: Callable[[os.DirEntry[str]], bool]) -> None:
    """Removes some files and folders in a folder; raises nothing."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if chosen(entry):
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def sweep_results(folder: Path) -> None:
    """Removes leftovers in a folder of results, for a command that finds all its results there and writes nothing."""
    for place in (folder, Path(tempfile.gettempdir())):
        sweep(place)


def _match_preview(entry: os.DirEntry[str]) -> re.Match[str] | None:
    """The owner of a preview; None for any other file."""
    if not _PREVIEW_NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
        return None
    with open(entry, "rb") as file:
        name = file.read(_HEAD).partition(PREVIEW)[2]
    return re.match(_OWNER, name.decode("latin-1"))


def _has_ended(match: re.Match[str]) -> bool:
    if match["host"] != _HOST:
        return False
    if int(match["pid"]) == os.getpid():
        return match["run"] != _run
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


@contextmanager
def temporary_folder(place: Path | None = None) -> Iterator[Path]:
    """A folder that is removed when the `with` ends; if the process is killed, when the next one is made in that place.

    Args:
        place: where it is made; the system's place for temporary files if None.
    """
    folder = hidden((place or Path(tempfile.gettempdir())) / "work")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def named_path(name: StrPath, what: str) -> Path:
    """The path of a user's text with ~ expanded, whether it exists or not.

    Args:
        name: the user's text.
        what: its name in the message.

    Raises:
        RequestError: it is empty, or nothing can ever have this name.
    """
    if not os.fspath(name):
        raise RequestError(f"{what} is empty: give a path")
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise RequestError(f"{what} is {str(name)!r:.80}, which leads nowhere: {why}") from error
    return path


def check_writable(path: Path, nbytes: int) -> None:
    """Raises OutputError, before any work is done, if `nbytes` could not be written to `path` now."""
    folder = path.parent
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


def is_from_macos(name: str) -> bool:
    """Whether macOS adds a file of this name: attributes of a file (`._NAME`) or of a folder's window."""
    return name == ".DS_Store" or name.startswith("._")


def umask() -> int:
    """The permission bits that new files do not get; the system only returns it when it is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason(error: OSError) -> str:
    """The reason of an error, in lower case, for the end of a sentence."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()
