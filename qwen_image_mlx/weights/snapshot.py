"""Gives the files of one checkpoint, from a directory or from the hub; knows their names, not their contents.

Files are fetched only when they are needed, one after another in the caller's thread.
A hub model is resolved to one commit on first use and everything comes from that commit.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, RequestError
from ..names import StrPath
from ..outside import why_not_read
from ..variants import DEMOS, MODEL_ALIASES, full_name
from .checkpoint_folder import Folder, Progress, cached_folder
from .safetensors_files import PICKLES, Tensor, component_tensors, is_gguf

if TYPE_CHECKING:
    from .hub import Repo

_SAFETENSORS, _GGUF, _INDEX = ".safetensors", ".gguf", ".safetensors.index.json"
_MMPROJ = "mmproj"  # what llama.cpp's files of vision towers have in their names
_MAX_JSON = 256 << 20  # the largest index of a model has some MB
_NUMBERED = re.compile(r"\d+\.safetensors")  # shards whose names show that they belong together


DEMO_ROOT = Path(__file__).parents[1] / "demo"

_NO_PICKLES = (
    "are pickles, which can run any code when they are read: use a checkpoint with .safetensors files, or convert this "
    "one where you trust it"
)


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one component, on disk and whole.

    Attributes:
        files: The safetensors or GGUF files.
        index: Tensor name to file name from the checkpoint's index, shards left out by `keep` included; None
            where the component is a single file.
        tensors: Every tensor that `files` hold, by name.
    """

    files: tuple[Path, ...]
    index: Mapping[str, str] | None
    tensors: Mapping[str, Tensor]


class HubSnapshot:
    """One checkpoint in the Hugging Face diffusers layout, opened lazily.

    Names of files are relative to the checkpoint and have forward slashes: "transformer/config.json". HF_HOME,
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured, by huggingface_hub itself.

    When the hub cannot be reached, what the cache holds of the revision is used, with a warning.

    Args:
        model: A directory, a model's id on the hub such as "Qwen/Qwen-Image", or one of `DEMOS` or
            `MODEL_ALIASES`. An existing directory wins over an id, but not over a demo: "./demo" is a directory. A
            model's folder in the hub's cache (`models--OWNER--NAME`, or its `snapshots`) means the snapshot that its
            refs/main names.
        revision: Branch, tag or commit on the hub; its main branch if None.
        offline: Use the cache only. HF_HUB_OFFLINE=1 does the same.
        progress: Called with (component or file name, bytes done, bytes in all) while a download runs, possibly from
            a thread of the downloader. Nothing is shown otherwise.

    Attributes:
        model: The `model` argument; a short name is replaced with the id it stands for.
        is_local: Whether it is on disk, so nothing is ever downloaded.
        offline: Whether only the cache is used.

    Raises:
        CheckpointError: The model is neither a directory nor a possible id, or a folder of the hub's cache without
            the requested snapshot.
        RequestError: A directory was given with a revision.
    """

    def __init__(
        self,
        model: StrPath,
        *,
        revision: str | None = None,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> None:
        model = full_name(model) if isinstance(model, str) else model
        local = _local_folder(model, revision)
        if local and revision is not None and not local.revision:
            raise RequestError(f"revision {revision!r} means nothing for the directory {model}: leave it out")
        self.model: str = os.fspath(model)
        self._revision = revision
        self.offline = offline
        self._progress = progress
        self.is_local: bool = local is not None
        self._opened: Folder | Repo | None = local

    @property
    def revision(self) -> str | None:
        """The commit hash, or None for a directory and for a hub model not used yet."""
        return self._opened.revision if self._opened else None

    def exists(self, name: str) -> bool:
        """Whether the checkpoint has this file (offline: whether it is in the cache).

        Raises:
            HubError: The hub cannot say, and nothing is cached.
        """
        return self._source().has(name)

    def names(self, folder: str) -> list[str]:
        """List the checkpoint's files in a folder, "" for its own (offline: those in the cache).

        Raises:
            HubError: The hub cannot say, and nothing is cached.
        """
        return self._source().names(folder)

    def file(self, name: str) -> Path:
        """Give the path of one file on disk, fetching it if needed.

        Raises:
            CheckpointError: The checkpoint has no such file.
            HubError: It cannot be fetched.
        """
        return self._source().fetch([name], label=name)[0]

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON object, fetching its file if needed.

        Raises:
            CheckpointError: The checkpoint has no such file, or it does not hold a JSON object.
            HubError: It cannot be fetched.
        """
        path = self.file(name)
        try:
            if why := why_not_read(path, _MAX_JSON):
                raise CheckpointError(f"{path} cannot be read, {why}: download it again")
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({error}): download it again") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object: download it again")
        return value

    def weight_files(self, component: str, stem: str, keep: Callable[[str], bool] | None = None) -> WeightFiles:
        """Give the weights of one component, fetching what is missing and checking that each file is whole.

        Files of the usual name come first. Where there are none, the folder's only index counts, or its only file of
        weights, or files that are named by numbers: other tools choose other names.

        Args:
            component: Its folder, "transformer"; "" for the checkpoint's own.
            stem: The usual file's name before ".safetensors": "diffusion_pytorch_model" or "model".
            keep: Whether a tensor is needed, by its name; shards without a needed tensor are neither fetched
                nor required. All are needed if None.

        Raises:
            CheckpointError: Files are missing or damaged, the index is not one, or the weights are pickles.
            HubError: They cannot be fetched.
        """
        source = self._source()
        index_name, names = self._find_weights(component, stem)
        index = None
        if index_name is not None:
            index = self._weight_map(index_name)
            shards = {shard for tensor, shard in index.items() if keep is None or keep(tensor)}
            names = [posixpath.join(component, shard) for shard in sorted(shards)]
        files = tuple(source.fetch(names, label=component or self.model))
        return WeightFiles(files, index, read_tensors(files, index))

    def _find_weights(self, component: str, stem: str) -> tuple[str | None, list[str]]:
        """The name of a component's index, or None and those of its files."""
        source = self._source()
        usual = posixpath.join(component, stem)
        if source.has(usual + _INDEX):
            return usual + _INDEX, []
        if source.has(usual + _SAFETENSORS):
            return None, [usual + _SAFETENSORS]
        there = source.names(component)
        indexes = [name for name in there if name.endswith(_INDEX)]
        files = [name for name in there if name.endswith((_SAFETENSORS, _GGUF))]
        files = [name for name in files if _MMPROJ not in posixpath.basename(name).lower()] or files
        if len(indexes) == 1:
            return indexes[0], []
        if len(files) == 1 or (files and all(_NUMBERED.fullmatch(posixpath.basename(name)) for name in files)):
            return None, files
        if files:
            raise CheckpointError(
                f"{self.model} has neither {usual}{_SAFETENSORS} nor one index for {', '.join(files)}, so it is not "
                "clear which of them belong together: leave one, or all with their index"
            )
        pickles = [name for name in there if name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(f"the weights {', '.join(pickles)} of {self.model} {_NO_PICKLES}")
        return None, [usual + _SAFETENSORS]

    def _weight_map(self, name: str) -> dict[str, str]:
        index = self.read_json(name).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise CheckpointError(
                f"{name} of {self.model} has no weight_map from tensor names to file names: download it again"
            )
        for shard in set(index.values()):
            # a plain name cannot lead out of the folder, whatever the index says
            if re.search(r"[/\\]", shard) or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{name} of {self.model} names the shard {shard!r}, which is not a .safetensors file of its own "
                    "folder: do not use this checkpoint unless you know why"
                )
        return index

    def _source(self) -> Folder | Repo:
        if self._opened is None:
            from .hub import open_model  # here: a model on disk needs no hub

            self._opened = open_model(self.model, self._revision, self.offline, self._progress)
        return self._opened


def sibling_vision_file(files: Sequence[Path]) -> Path | None:
    """llama.cpp's vision tower (`*mmproj*.gguf`) in the folder of a text encoder's GGUF file; None without one.

    Of several, the one whose name shares the longest prefix with the text encoder's, then the first by name.
    """
    if len(files) != 1 or files[0].suffix.lower() != _GGUF:
        return None
    found = [file for file in sorted(files[0].parent.glob(f"[!.]*{_GGUF}")) if _MMPROJ in file.name.lower()]
    pairs = ((file, zip(file.name, files[0].name, strict=False)) for file in found if file != files[0])
    same = {file: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for file, pair in pairs}
    return max(same, key=lambda file: same[file], default=None)


def read_tensors(files: Sequence[Path], index: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The headers of a component's safetensors or GGUF files as one.

    Raises:
        CheckpointError: a file is damaged, a name is in two files, or the index promises a tensor that is missing.
    """
    if len(files) == 1 and is_gguf(files[0]):
        from .gguf import read_gguf  # here: most checkpoints have no GGUF file

        return dict(read_gguf(files[0])[0])
    return component_tensors(files, index)


def weight_file(path: Path) -> WeightFiles:
    """A single weights file.

    Raises:
        RequestError: the file does not exist, or its suffix is not a weights file's.
        CheckpointError: it is a pickle or damaged.
    """
    if not path.is_file():
        raise RequestError(f"the file {str(path)!r} does not exist: give one that exists")
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when it is read: use its {_SAFETENSORS} version, or convert "
            "it where you trust it"
        )
    if path.suffix.lower() not in (_SAFETENSORS, _GGUF):
        raise RequestError(f"{path} is not a weights file this package reads: give a {_SAFETENSORS} or a {_GGUF} file")
    return WeightFiles((path,), None, read_tensors([path]))


def _local_folder(model: StrPath, revision: str | None) -> Folder | None:
    """The folder of a directory or a demo; None for a hub id."""
    if model in DEMOS:
        return Folder(DEMO_ROOT / model, shared=DEMO_ROOT / "shared")
    path = os.path.expanduser(model)
    if path and os.path.isdir(path):
        return cached_folder(Path(path), revision) or Folder(Path(path))
    if os.path.exists(path):
        raise CheckpointError(f"{model} is a file: give the directory of a checkpoint, the one with model_index.json")
    if "/" not in str(model) or not _is_repo_id(model):  # ids without an owner are not those of checkpoints
        near = get_close_matches(str(model).lower(), MODEL_ALIASES, 1)
        hint = f"; did you mean {near[0]}?" if near and "/" not in str(model) else ""
        raise CheckpointError(
            f"no directory {str(model)!r} exists: give one that does, or a model's id such as Qwen/Qwen-Image{hint}"
        )
    return None


def _is_repo_id(model: StrPath) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it imports it without "as"

    try:
        validate_repo_id(cast(str, model))  # refuses a Path, too
    except HFValidationError:
        return False
    return True
