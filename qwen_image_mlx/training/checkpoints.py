"""Checkpoints of a run: one file each, complete or absent, from which it resumes bit-identically."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from ..files import reason
from ..gpu import gpu_faults
from ..weights.safetensors_files import load_tensors, save_tensors
from .loop import Trainer

_FORMAT = "qwen_image_mlx.training.1"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
KEPT = 2  # the last one, and the one before in case the last is lost


def save_checkpoint(folder: Path, trainer: Trainer, record: Mapping[str, Any]) -> Path:
    """Writes the state of a trainer, and removes all checkpoints but the last two.

    Args:
        folder: of the run's checkpoints; made if missing.
        trainer: its step, parameters, average and optimizer.
        record: JSON of what the run depends on; `load_checkpoint` compares it.

    Raises:
        OutputError: it could not be written; the earlier ones stay.
    """
    path = folder / f"step-{trainer.step:06}.safetensors"
    metadata = {"format": _FORMAT, "step": str(trainer.step), "record": json.dumps(record, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {reason(error)}") from error
    save_tensors(path, trainer.state, metadata)
    for _, old in _found(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step; None without any."""
    found = _found(folder)
    return found[-1][1] if found else None


def load_checkpoint(path: Path, trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Restores the state of a trainer that `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is damaged, or belongs to a run with a different record.
    """
    try:
        state, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError("it is not a checkpoint of a training run")
        step, written = int(metadata["step"]), json.loads(metadata["record"])
        if not isinstance(written, dict):
            raise ValueError("its record is not a JSON object")
        if step < 0:
            raise ValueError("its step is below 0")
    except (OSError, RuntimeError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it to go on from the one before") from error
    here = json.loads(json.dumps(record))
    changed = [name for name in {*here, *written} if here.get(name) != written.get(name)]
    if changed:
        changes = ", ".join(
            f"{name} {written.get(name)!r:.60} and not {here.get(name)!r:.60}" for name in sorted(changed)
        )
        raise CheckpointError(
            f"{path} belongs to a run with {changes}: use the settings of that run, or a different folder"
        )
    try:
        with gpu_faults():
            trainer.restore(step, state)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} belongs to a different network or is damaged ({error})") from error


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(steps, file) of every checkpoint, fewest steps first."""
    files = folder.iterdir() if folder.is_dir() else []
    return sorted((int(found[1]), file) for file in files if (found := _NAME.fullmatch(file.name)))
