"""Gives the files of one model on the Hugging Face hub, at one commit, through huggingface_hub and its cache.

Knows nothing about their contents. Files are fetched one after another in the caller's thread; errors of
huggingface_hub become one sentence with a cure.
"""

from __future__ import annotations

import logging
import posixpath
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HubError
from ..files import atomic_file
from .checkpoint_folder import COMMIT, Folder, Progress, require_files

logger: logging.Logger = logging.getLogger(__name__)
_SPACE_MARGIN = 1.05


@dataclass(frozen=True)
class _HubFile:
    size: int | None
    blob: str | None


@dataclass(frozen=True)
class Repo:
    """One commit of a model on the hub, fetched file by file into huggingface_hub's cache."""

    repo: str
    revision: str
    listing: Mapping[str, _HubFile]
    progress: Progress | None

    def has(self, name: str) -> bool:
        """Whether the commit has the file."""
        return name in self.listing

    def names(self, folder: str) -> list[str]:
        """The files of a folder."""
        return sorted(name for name in self.listing if posixpath.dirname(name) == folder)

    def fetch(self, names: Sequence[str], label: str) -> list[Path]:
        """Paths of the files, downloaded if need be; `label` names them in messages."""
        require_files([name for name in names if not self.has(name)], f"{self.repo} at commit {self.revision}")
        waiting = [name for name in names if not self._is_whole(self._snapshot / name, name)]
        absent = {name: self.listing[name].size or 0 for name in waiting if not self._is_whole(self._blob(name), name)}
        total = sum(absent.values())
        if absent:
            _require_space(total, f"{label} of {self.repo}")
            files = f"{len(absent)} file{'s' * (len(absent) > 1)}"
            logger.info("downloading %s of %s: %s, %s", label, self.repo, files, _human(total))
        meter = _Meter(label, total, self.progress)
        for name in waiting:
            self._download(name, meter)
            meter.add_file(absent.get(name, 0))
        return [self._snapshot / name for name in names]

    def _download(self, name: str, meter: _Meter) -> None:
        from huggingface_hub import hf_hub_download

        try:
            # huggingface_hub accepts an existing file of this name or hash as it is, even a truncated one
            for path in (self._snapshot / name, self._blob(name)):
                if path is not None and path.is_file() and not self._is_whole(path, name):
                    path.unlink()
            path = Path(hf_hub_download(self.repo, name, revision=self.revision, tqdm_class=meter.tqdm_class()))
        except _failures() as error:
            raise _explain(error, self.repo, self.revision, name) from error
        if not self._is_whole(path, name):
            raise HubError(
                f"{name} of {self.repo} arrived with {path.stat().st_size} bytes where the hub lists "
                f"{self.listing[name].size}: run again to fetch it again"
            )

    @property
    def _snapshot(self) -> Path:
        return _cache_folder(self.repo) / "snapshots" / self.revision

    def _blob(self, name: str) -> Path | None:
        """Where the cache keeps this file's content; a different commit may have put it there."""
        blob = self.listing[name].blob
        return _cache_folder(self.repo) / "blobs" / blob if blob else None

    def _is_whole(self, path: Path | None, name: str) -> bool:
        size = self.listing[name].size
        return path is not None and path.is_file() and size in (None, path.stat().st_size)


class _Meter:
    """Combines files that are fetched one after another into one progress report that never goes back."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self._label = label
        self._total = total
        self._progress = progress
        self._earlier_files = 0
        self._done = 0

    def advance(self, file_bytes: int) -> None:
        done = min(self._earlier_files + file_bytes, self._total)
        if done > self._done:
            self._done = done
            if self._progress:
                self._progress(self._label, done, self._total)

    def add_file(self, size: int) -> None:
        self._earlier_files += size
        self.advance(0)

    def tqdm_class(self) -> type:
        """Make the progress-bar class that huggingface_hub uses for one file."""
        meter = self

        class Bar:
            # Xet downloads open a second bar unless the class has update_transfer; the meter counts bytes on disk.
            def __init__(self, *_: Any, total: float | None = None, initial: int = 0, **__: Any) -> None:
                self.total = total
                self.n = initial

            def update(self, n: float | None = 1) -> None:
                self.n += n or 0
                meter.advance(int(self.n))

            def ignore(self, *_: Any, **__: Any) -> None:
                pass

            update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = ignore
            refresh = close = __exit__ = ignore

            def __enter__(self) -> Bar:
                return self

        return Bar


def open_model(repo: str, revision: str | None, offline: bool, progress: Progress | None) -> Folder | Repo:
    """The model at the commit its revision names: on the hub, or in the cache when the hub cannot be reached.

    Raises:
        HubError: the hub does not have it, or cannot be reached and nothing is cached.
    """
    from huggingface_hub import HfApi, constants

    revision = revision or constants.DEFAULT_REVISION
    if PurePosixPath(revision).is_absolute() or ".." in revision:  # git allows neither, and it becomes a path
        raise HubError(f"{revision!r} cannot be a revision of {repo}: name a branch, a tag or a commit")
    if offline or constants.HF_HUB_OFFLINE:
        cached = _open_cached(repo, revision)
        if cached is None:
            raise HubError(
                f"nothing of {repo} at revision {revision!r} is in the cache and offline mode is on: run once online, "
                "without HF_HUB_OFFLINE, to fetch it"
            )
        return cached
    try:
        # without a timeout the library waits forever here
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = info.sha
        if commit is None or not COMMIT.fullmatch(commit):
            raise ValueError(f"it gives {commit!r} for a commit")
        listing = {
            file.rfilename: _HubFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in info.siblings or ()
        }
    except (*_failures(), KeyError, TypeError) as error:
        # an answer not from the hub comes from a login page or a proxy: treat it like a missing network
        misread = isinstance(error, (ValueError, KeyError, TypeError)) and _status(error) is None
        if not (misread or _is_down(error)):
            raise _explain(error, repo, revision) from error
        cached = _open_cached(repo, revision)
        if cached is None:
            raise HubError(
                f"the hub at {constants.ENDPOINT} cannot be reached ({_reason(error)}) and nothing of {repo} is in the "
                "cache: check the connection and run again, or give a directory"
            ) from error
        logger.warning(
            "the hub at %s cannot be reached (%s): using what the cache holds of %s at commit %s",
            constants.ENDPOINT,
            _reason(error),
            repo,
            cached.revision,
        )
        return cached
    _remember(repo, revision, commit)
    return Repo(repo, commit, listing, progress)


def _cache_folder(repo: str) -> Path:
    """The cache's folder of one model; its layout is documented (huggingface_hub, "Understand caching")."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))


def _open_cached(repo: str, revision: str) -> Folder | None:
    folder = _cache_folder(repo)
    try:
        commit = revision if COMMIT.fullmatch(revision) else (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    root = folder / "snapshots" / commit
    return Folder(root, commit, repo) if COMMIT.fullmatch(commit) and root.is_dir() else None


def _remember(repo: str, revision: str, commit: str) -> None:
    """Record the commit of a branch or tag for later offline runs; huggingface_hub does not do it here."""
    if revision == commit:
        return
    ref = _cache_folder(repo) / "refs" / revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(ref) as new:
            new.write_text(commit)
    except OSError as error:
        logger.debug("%s cannot be written (%s)", ref, error)  # a read-only cache still serves what it has


def _require_space(needed: int, what: str) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if free < needed * _SPACE_MARGIN:
        raise HubError(
            f"{what} needs {_human(needed * _SPACE_MARGIN)} but only {_human(free)} are free where {cache} is: "
            "free some space, or set HF_HOME to a folder on a larger disk"
        )


def _human(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its HTTP and Xet clients raise when something outside this process fails."""
    from huggingface_hub import errors

    # errors.HTTPError is the HTTP client's own base class: httpx in 1.x, httpx2 in 2.x
    return (errors.HTTPError, errors.EntryNotFoundError, OSError, RuntimeError, ValueError)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_down(error: BaseException) -> bool:
    from huggingface_hub import errors

    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError))


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"HTTP status {status}"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _explain(error: BaseException, repo: str, revision: str, name: str | None = None) -> HubError:
    """Turn an error of huggingface_hub about a model or one of its files into one sentence with a cure."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the library wraps the real failure of a request in "not in the cache"
    what = f"{name} of {repo}" if name else repo
    page = f"{constants.ENDPOINT}/{repo}"
    unknown = (
        f"the hub has no model named {repo}, and no local directory has that name: check the spelling, or set "
        "HF_TOKEN if it is private"
    )
    kinds = {
        errors.GatedRepoError: f"{repo} is gated: accept its conditions at {page}, then set HF_TOKEN to your token",
        errors.RepositoryNotFoundError: unknown,
        errors.RevisionNotFoundError: f"{repo} has no revision {revision!r}: see {page} for its branches and tags",
        errors.EntryNotFoundError: f"the hub lists {what} but does not have it: try again later, or another revision",
    }
    statuses = {
        401: f"the hub does not accept your token for {what} (401): set HF_TOKEN to a valid one, or unset it",
        403: f"your token may not read {what} (403): set HF_TOKEN to one that has access, see {page}",
        404: unknown,
    }
    for kind, sentence in kinds.items():
        if isinstance(error, kind):
            return HubError(sentence)
    if _status(error) in statuses:
        return HubError(statuses[_status(error)])
    return HubError(
        f"fetching {what} failed ({_reason(error)}): check the connection and the disk, then run again; files that "
        "are complete are kept"
    )
