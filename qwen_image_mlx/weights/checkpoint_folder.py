"""Gives the files of one checkpoint on disk: a user's directory, or a commit in the hub's cache. No network access."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, HubError, some
from ..files import is_from_macos

Progress = Callable[[str, int, int], None]

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Folder:
    """A checkpoint on disk, possibly incomplete: the user's directory, or a commit in the cache.

    Attributes:
        root: the folder of its files.
        revision, repo: of a commit in the cache.
        shared: the folder that has the subfolders `root` lacks.
    """

    root: Path
    revision: str | None = None
    repo: str | None = None
    shared: Path | None = None

    def has(self, name: str) -> bool:
        """Whether the file exists."""
        return self._path(name).is_file()

    def names(self, folder: str) -> list[str]:
        """The files of a folder, without the hidden ones that macOS adds on other file systems (`._NAME`)."""
        try:
            entries = os.scandir(self._path(folder))
            found = [entry.name for entry in entries if entry.is_file() and not is_from_macos(entry.name)]
        except OSError:
            return []
        return sorted(posixpath.join(folder, name) for name in found)

    def _path(self, name: str) -> Path:
        part = name.partition("/")[0]
        return (self.root if self.shared is None or (self.root / part).exists() else self.shared) / name

    def fetch(self, names: Sequence[str], label: str) -> list[Path]:
        """Paths of the files; raises CheckpointError or HubError if one is not there."""
        missing = [name for name in names if not self.has(name)]
        if missing and self.repo:
            raise HubError(
                f"the cache does not hold {', '.join(missing)} of {self.repo} at commit {self.revision} and the hub "
                "is out of reach: run again online to fetch the rest"
            )
        require_files(missing, str(self.root))
        return [self._path(name) for name in names]


def cached_folder(path: Path, revision: str | None = None) -> Folder | None:
    """The snapshot that a model's folder in the hub's cache stands for (`models--OWNER--NAME` or its `snapshots`).

    The one that refs/main (or refs/`revision`) names, else the only one; None if the folder is something else.

    Raises:
        CheckpointError: several snapshots could be meant, or none exists.
    """
    whole = path.absolute()
    root = whole.parent if whole.name == "snapshots" else whole
    if not root.name.startswith("models--") or (path / "model_index.json").exists():
        return None
    repo, refs = root.name.removeprefix("models--").replace("--", "/"), root / "refs"
    found = {entry.name: entry for entry in root.glob("snapshots/*") if entry.is_dir()}
    try:
        commit = revision if revision in found else (refs / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = next(iter(found)) if len(found) == 1 and revision is None else None
    if commit in found:
        return Folder(found[commit], commit if COMMIT.fullmatch(commit) else None)
    held = f"holds the snapshots {some(sorted(found))}" if found else "holds no snapshot"
    raise CheckpointError(
        f"{path} is the hub's cache of {repo} and {held}, not the one of {revision or 'main'}: give {repo}"
        + (f", or {root / 'snapshots'} with one of their names" if found else " to have it downloaded")
    )


def require_files(missing: Collection[str], where: str) -> None:
    """Raises CheckpointError if any names are missing."""
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}: give a complete checkpoint in the diffusers layout")
