"""Files and folders while they are being written: under hidden names that tell who writes them, and for how long.

A result gets its own name when it is whole, in one step, and never over anything. A process that is killed leaves
hidden files behind; each name tells the program, the machine and the process, so the next run in that folder removes
those of processes that have ended, and no others.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

PREVIEW = b"tEXtqwen_image_mlx preview\0"  # begins what a preview's PNG says of whoever shows it
PREVIEW_KEY = PREVIEW[4:-1].decode()
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_OWNER = r"(?P<host>[0-9a-f]{8})-(?P<pid>[1-9]\d{0,9})-(?P<run>[0-9a-f]{8})"
_HIDDEN = re.compile(rf"\..*\.{_OWNER}-\d+\.qwen-image-mlx(\.[a-z0-9]+)?", re.DOTALL)
_PREVIEW_NAME = re.compile(r".*-preview(-\d+)?\.png", re.DOTALL)
_HEAD = 300  # bytes of a PNG in which a preview says what it is
_NAME_SHOWN = 30  # characters; a name takes up to four bytes for each, of the 255 there are
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_run = os.urandom(4).hex()  # a later process may have the same number
_numbers = count()
_swept: set[str] = set()


def owner() -> str:
    """This machine, this process and this start of it, for a name."""
    return f"{_HOST}-{os.getpid()}-{_run}"


def hidden(path: Path) -> Path:
    """A new hidden name beside `path`, with its ending, for what will be renamed to it; removes leftovers there."""
    if (folder := os.path.abspath(path.parent)) not in _swept:
        _swept.add(folder)
        sweep(path.parent)
    ending = path.suffix if re.fullmatch(r"\.[a-z0-9]{1,20}", path.suffix) else ""
    return path.with_name(f".{path.name[:_NAME_SHOWN]}.{owner()}-{next(_numbers)}.qwen-image-mlx{ending}")


def publish(partial: Path, path: Path) -> Path:
    """Gives a whole file its name, or the first free `-1`, `-2`, … beside it; raises OSError, and the file stays."""
    for candidate in _candidates(path):
        try:
            os.link(partial, candidate)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _renamed(partial, candidate):
                continue
        partial.unlink(missing_ok=True)
        return candidate
    raise AssertionError("unreachable: candidates never end")


def _renamed(partial: Path, candidate: Path) -> bool:
    """For file systems without links: whether the name was free, and is taken now."""
    try:
        os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        os.replace(partial, candidate)
    except BaseException:  # Ctrl-C too: the name would stay with nothing in it
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
        folder: where; what lies in its folders is not looked at.
        alone: whether the caller knows that nobody else writes here, on no machine either.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                match = _HIDDEN.fullmatch(entry.name) or _previewed(entry)
                if match and (alone or _has_ended(match)):
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def sweep_results(folder: Path) -> None:
    """The same where a command writes, for one that finds all its results there and writes nothing."""
    for place in (folder, Path(tempfile.gettempdir())):
        sweep(place)


def _previewed(entry: os.DirEntry[str]) -> re.Match[str] | None:
    """Who shows a preview; None for any other file."""
    if not _PREVIEW_NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
        return None
    with open(entry, "rb") as file:
        said = file.read(_HEAD).partition(PREVIEW)[2]
    return re.match(_OWNER, said.decode("latin-1"))


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
    """A folder that goes when the `with` ends; if the process is killed, when the next one is made in that place.

    Args:
        place: where it is made; the system's place for temporary files if None.
    """
    folder = hidden((place or Path(tempfile.gettempdir())) / "work")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
