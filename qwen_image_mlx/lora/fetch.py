"""LoRAs by reference: where they are, fetched if need be, bound to the transformer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import RequestError
from ..names import LoRAMode, StrPath
from ..weights.checkpoint_folder import Progress
from ..weights.snapshot import HubSnapshot
from .adapters import Adapters
from .file import SUFFIX, read_lora
from .references import kind_of, parse_reference

logger: logging.Logger = logging.getLogger(__name__)

LoRAReference = StrPath | tuple[StrPath, float]


def read_adapters(
    references: Sequence[LoRAReference],
    mode: LoRAMode,
    targets: Mapping[str, tuple[int, ...]],
    *,
    offline: bool,
    download: Progress | None = None,
) -> Adapters:
    """Reads LoRA files and binds them to the modules; reads their weights once to check them, and drops them.

    Args:
        references: `REF` or `REF@STRENGTH`, or pairs of the two; REF is a file, a folder, `owner/repo`,
            `owner/repo:file` or the address of a file on the hub.
        mode: one of `variants.LORA_MODES`.
        targets: the modules they may change, with their weights' shapes.
        offline: never ask the network.
        download: called with file, bytes done and bytes in all during a download.

    Raises:
        RequestError: a reference leads nowhere, a strength is not a finite number, or the mode is unknown.
        CheckpointError: a file is damaged or made for a different model.
        HubError: a file could not be downloaded.
    """
    if isinstance(references, str | os.PathLike):
        references = [references]
    if not isinstance(references, Iterable):
        raise RequestError(f"loras are {references!r:.80}, but must be a list of references")
    split = [split_reference(reference) for reference in references]
    loras = [read_lora(fetch_lora(reference, offline, download), targets, strength) for reference, strength in split]
    for lora in loras:
        lora.check()
    adapters = Adapters(
        loras, mode, [f"{reference}@{float(strength)!r}".removesuffix(".0") for reference, strength in split]
    )
    if distilled := adapters.distillation:
        logger.info(
            "a distilled LoRA (by %s): %d steps, guidance %g and %s unless told otherwise",
            distilled.evidence, distilled.steps, distilled.cfg_scale, distilled.schedule,
        )  # fmt: skip
    return adapters


def split_reference(reference: LoRAReference) -> tuple[str, float]:
    """(reference, strength) of a caller's reference; raises RequestError for a wrong type."""
    if isinstance(reference, str):
        return parse_reference(reference)
    if isinstance(reference, os.PathLike):
        return os.fspath(reference), 1.0
    if isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], str | os.PathLike):
        return os.fspath(reference[0]), reference[1]
    raise RequestError(f"a LoRA is {reference!r:.80}, but must be a reference, or (reference, strength)")


def fetch_lora(reference: str, offline: bool = False, download: Progress | None = None) -> Path:
    """The file or folder of a LoRA; as `fetch_file`."""
    return fetch_file(reference, "LoRA", offline, download)


def fetch_file(reference: str, what: str, offline: bool = False, download: Progress | None = None) -> Path:
    """The file or folder a reference leads to, downloaded if need be.

    Args:
        reference: without a strength.
        what: how messages call it.
        offline: never ask the network.
        download: called with file, bytes done and bytes in all during a download.

    Raises:
        RequestError: the reference leads nowhere, or to several files.
        HubError: the file could not be downloaded.
    """
    source = kind_of(reference, what)
    if source.path is not None:
        return source.path
    assert source.repo is not None
    snapshot = HubSnapshot(source.repo, revision=source.revision, offline=offline, progress=download)
    name = source.file or _only_file(snapshot, source.repo, what)
    folder, _, file = name.rpartition("/")
    settings = f"{folder}/adapter_config.json".lstrip("/")
    if file == "adapter_model.safetensors" and snapshot.exists(settings):
        snapshot.file(settings)  # PEFT keeps the scale in this file
    return snapshot.file(name)


def _only_file(snapshot: HubSnapshot, repo: str, what: str) -> str:
    names = [name for name in snapshot.names("") if name.endswith(SUFFIX)]
    if len(names) != 1:
        found = f"{len(names)} {what} files: {', '.join(names)}" if names else f"no {SUFFIX} file"
        example = names[0] if names else f"folder/file{SUFFIX}"
        raise RequestError(f"{repo} holds {found}; name one as in {repo}:{example}")
    return names[0]
