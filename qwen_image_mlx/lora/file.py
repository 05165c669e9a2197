"""A LoRA file, bound to the modules of a transformer by the names and shapes of its tensors alone.

It is read and checked here, independently of loader, pipeline and modules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, RequestError
from ..names import StrPath
from ..weights.safetensors_files import PICKLES, read_header
from .dialects import bind, check_dtypes
from .kinds import Shape, factored_kind
from .peft import PeftConfig, peft_config
from .update import Arrays, Update

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LoRA:
    """A LoRA file, bound to the modules of a transformer.

    Attributes:
        path: the file.
        strength: how much of it is applied; any finite number.
        updates: its changes, by the module's canonical name.
        unmatched: names of its tensors that belong to no module, and therefore do nothing.
        total: number of the transformer's matrices.
        dialects: the naming conventions in it, most frequent first.
        metadata: the header's metadata.
        peft: PEFT's settings, where the scales come from there.
        nbytes: bytes of its tensors.
    """

    path: Path
    strength: float
    updates: Mapping[str, Update] = field(repr=False, compare=False)
    unmatched: tuple[str, ...] = field(repr=False, compare=False)
    total: int = field(repr=False, compare=False)
    dialects: tuple[str, ...] = field(repr=False, compare=False)
    metadata: Mapping[str, str] = field(repr=False, compare=False)
    peft: PeftConfig | None = field(repr=False, compare=False)
    nbytes: int = field(repr=False, compare=False)

    @property
    def matched(self) -> int:
        """How many of the `total` matrices it changes."""
        return sum(update.changes_weight and len(update.shape) == 2 for update in self.updates.values())

    @property
    def biases(self) -> int:
        """How many biases it changes."""
        return sum(update.changes_bias for update in self.updates.values())

    def check(self) -> None:
        """Reads everything once, one target at a time.

        Raises:
            CheckpointError: the file holds NaN or infinity, or ends too early.
        """
        for update in self.updates.values():
            update.check()


def read_lora(path: StrPath, targets: Mapping[str, Shape], strength: float = 1.0) -> LoRA:
    """Reads the header of a LoRA file and binds its tensors; of its weights only the alphas, single numbers, are read.

    Args:
        path: a safetensors file, or a folder that holds exactly one.
        targets: canonical module name -> shape of its weight: (out, in), or (dim,) of a norm.
        strength: how much of it to apply.

    Raises:
        RequestError: the path leads to no safetensors file, or the strength is not a finite number.
        CheckpointError: the file is damaged, was made for a different model, does not fit a target, or is inconsistent.
    """
    path = weights_file(path)
    strength = _check_strength(strength, path)
    tensors, metadata = read_header(path)
    binding = bind(path, tensors, targets)
    check_dtypes(path, tensors, binding)
    peft = peft_config(path, metadata)
    arrays = Arrays(path)
    updates = {}
    for target, roles in binding.tensors.items():
        kind = factored_kind(path, target, targets[target], roles)
        update = Update(target, tuple(targets[target]), kind, roles, 1.0, strength, arrays)
        updates[target] = replace(update, scale=_scale(path, update, peft, arrays))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    total = sum(len(shape) == 2 for shape in targets.values())
    return LoRA(path, strength, updates, binding.unmatched, total, binding.dialects, metadata, peft, nbytes)


def weights_file(path: StrPath) -> Path:
    """The one safetensors file that a path to a file or folder means.

    Raises:
        RequestError: none or several exist, or it is a pickle.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        try:
            files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        except OSError as error:
            raise RequestError(f"the folder {path} cannot be read ({error.strerror}): check its permissions") from error
        found = [file for file in files if file.suffix == SUFFIX]
        if len(found) == 1:
            return found[0]
        if found:
            raise RequestError(
                f"the folder {path} holds {len(found)} LoRA files ({', '.join(file.name for file in found)}): "
                "name one of them"
            )
        path = next((file for file in files if file.suffix in PICKLES), path)
        if os.path.isdir(path):
            raise RequestError(f"the folder {path} holds no {SUFFIX} file: give a LoRA's file or its folder")
    if not os.path.exists(path):
        raise RequestError(f"the LoRA {path} does not exist: give a {SUFFIX} file that does")
    if path.suffix.lower() in PICKLES:
        raise RequestError(
            f"{path} is a pickle, which can run any code when it is read: use its {SUFFIX} version, or convert it "
            "where you trust it"
        )
    return path


def _check_strength(strength: float, path: Path) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise RequestError(f"the strength of {path} is {strength!r}: give a finite number, 1 for the LoRA as trained")
    return float(strength)


def _scale(path: Path, update: Update, peft: PeftConfig | None, arrays: Arrays) -> float:
    """alpha / rank: by PEFT's settings where there are any, else by the file's alpha; 1 without either."""
    if peft:
        rank = peft.rank_of(update.target)
        if update.kind and update.rank not in (None, rank):
            raise CheckpointError(
                f"{path} contradicts itself: its settings give {update.target} the rank {rank} and its tensors have "
                f"{update.rank}; correct r or rank_pattern in the settings, or save it again"
            )
        if peft.decomposed and update.kind == "LoRA" and not update.is_dora:
            raise CheckpointError(
                f"{path} says it is a DoRA and has no magnitude for {update.target}: save it again with its "
                "lora_magnitude_vector tensors"
            )
        return peft.scale_of(update.target)
    if "alpha" not in update.tensors or update.rank is None:
        return 1.0
    return arrays.take(update.tensors["alpha"]).item() / update.rank
