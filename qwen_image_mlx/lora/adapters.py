"""Applies LoRAs to a model: merged into the weights, or run unmerged.

Merged in fp32, before anything is rounded or packed, a LoRA costs nothing at run time. Where the stored weights could
not hold its change, because they are packed already or too coarse for it, it runs unmerged, as one low-rank branch
for all LoRAs together.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cached_property

import mlx.core as mx

from ..errors import CheckpointError, RequestError, some
from ..gpu import finish
from ..models import nn
from ..variants import LORA_MODES
from ..weights.changes import Branch
from ..weights.packed import Packed
from ..weights.quantize import quantize_matrix
from ..weights.schemes import Scheme
from .branch import attach_branch
from .distillations import Distillation, distillation_of
from .file import LoRA
from .update import Update

logger: logging.Logger = logging.getLogger(__name__)

_ENOUGH = 0.9  # share of a change that the stored weights must keep; below it "auto" runs the LoRA unmerged


class Adapters:
    """Several LoRAs for one model.

    Args:
        loras: in any order; their changes are added.
        mode: "merge" merges, "side" runs them unmerged, "auto" merges unless the stored weights would lose
            the change.
        references: the references they were loaded by, for the record.

    Raises:
        RequestError: the mode is unknown.
    """

    def __init__(self, loras: Sequence[LoRA], mode: str = "auto", references: Sequence[str] = ()):
        if mode not in LORA_MODES:
            raise RequestError(f"the LoRA mode is {mode!r}, but must be one of {', '.join(LORA_MODES)}")
        self.loras: tuple[LoRA, ...] = tuple(loras)
        self.mode = mode
        self.references: tuple[str, ...] = tuple(references)
        for lora in loras:
            biases = f" and {lora.biases} biases" if lora.biases else ""
            logger.info(
                "LoRA %s at %g: changes %d of %d matrices%s",
                lora.path.name, lora.strength, lora.matched, lora.total, biases,
            )  # fmt: skip
            if lora.unmatched:
                logger.warning(
                    "LoRA %s: %d of its tensors belong to nothing in this model and do nothing: %s",
                    lora.path.name, len(lora.unmatched), some(lora.unmatched),
                )  # fmt: skip

    @property
    def paths(self) -> set[str]:
        """The modules that they change, by canonical name."""
        return {path for lora in self.loras for path in lora.updates}

    def updates(self, path: str) -> list[Update]:
        """The LoRAs' changes of a module, by its canonical name."""
        return [lora.updates[path] for lora in self.loras if path in lora.updates]

    @cached_property
    def distillation(self) -> Distillation | None:
        """The sampling of the first distilled LoRA; None without one."""
        return next(filter(None, map(distillation_of, self.loras)), None)

    def placement(self) -> Placement:
        """What applies the LoRAs to one module while it is loaded."""
        return Placement(self)

    def changes(self, name: str) -> bool:
        """Whether a parameter is changed by any of them."""
        path, _, parameter = name.rpartition(".")
        if parameter == "weight":
            return any(update.changes_weight for update in self.updates(path))
        return parameter == "bias" and any(update.changes_bias for update in self.updates(path))

    def apply(self, name: str, value: mx.array) -> mx.array:
        """A parameter with all changes applied: fp32, its shape unchanged, evaluated."""
        path, _, parameter = name.rpartition(".")
        base = value.astype(mx.float32)
        updates = self.updates(path)
        deltas = [update.delta(base) if parameter == "weight" else update.bias_delta() for update in updates]
        changed = sum((delta for delta in deltas if delta is not None), base)
        mx.eval(changed)
        return changed

    def check(self, packed: Collection[str]) -> None:
        """Checks, reading nothing, that every change can be merged or run unmerged.

        Args:
            packed: the modules, by canonical name, whose weights are packed already.

        Raises:
            CheckpointError: a change of a packed weight cannot run unmerged, or is to be merged.
        """
        for lora in self.loras:
            for path, update in lora.updates.items():
                if not update.changes_weight or path not in packed:
                    continue
                if self.mode == "merge":
                    raise CheckpointError(
                        f"a LoRA cannot be merged into the packed weights of {path}: packing them again would lose it; "
                        'let it run unmerged (LoRA mode "side"), or merge it into the model they were packed from'
                    )
                if not update.has_factors:
                    raise CheckpointError(
                        f"the change of {path} by {lora.path.name} cannot run unmerged with packed weights, as a "
                        "plain LoRA's could: use the model they were packed from, quantized while it loads"
                    )

    def can_run_unmerged(self, path: str) -> bool:
        """Whether all changes of a module can run unmerged; reads nothing."""
        return all(update.has_factors and not update.changes_bias for update in self.updates(path))

    def branch(self, path: str, dtype: mx.Dtype) -> Branch | None:
        """A module's unmerged branch, the ranks of all LoRAs one after another; None if a change has no factors.

        Returns:
            A (r, in), B (out, r) in `dtype`, evaluated.
        """
        pairs = [update.factors() for update in self.updates(path)]
        if None in pairs:
            return None
        a, b = zip(*pairs, strict=True)
        branch = mx.concatenate(a, axis=0).astype(dtype), mx.concatenate(b, axis=1).astype(dtype)
        mx.eval(branch)
        return branch


class Placement:
    """Applies LoRAs while one module is loaded, and counts where they went.

    Args:
        adapters: the LoRAs.

    Attributes:
        merged, unmerged: number of matrices with merged and with unmerged LoRAs.
        altered: whether any loaded weight contains a merged change.
    """

    def __init__(self, adapters: Adapters):
        self.adapters = adapters
        self.merged: int = 0
        self.unmerged: int = 0
        self.altered: bool = False
        self._kept = self._whole = 0.0

    @property
    def share_kept(self) -> float | None:
        """The share of the merged change in the stored weights: <stored - W, change> / <change, change>; or None."""
        return self._kept / self._whole if self._whole else None

    def matrix(
        self, name: str, value: mx.array | Packed, scheme: Scheme | None, dtype: mx.Dtype
    ) -> tuple[mx.array | Packed, Branch | None]:
        """The (out, in) matrix to store, and the branch that runs unmerged.

        Args:
            name: the canonical name of a weight that is changed.
            value: (out, in) as read: dense, or packed already, which `Adapters.check` has allowed.
            scheme: packs the result; None stores it dense.
            dtype: of the dense result.

        Returns:
            The weight, dense in `dtype` or packed, and A (r, in), B (out, r) in `dtype` or None; evaluated.
        """
        path = name.removesuffix(".weight")
        if isinstance(value, Packed):
            return value, self._branch(path, dtype)
        base = value.astype(mx.float32)
        if self.adapters.mode == "side" and (branch := self._branch(path, dtype)):
            return _store(base, scheme, dtype), branch
        changed = self.adapters.apply(name, base)
        stored = _store(changed, scheme, dtype)
        kept, whole = _survival(base, changed, stored)
        if self.adapters.mode == "auto" and kept < _ENOUGH * whole and (branch := self._branch(path, dtype)):
            return _store(base, scheme, dtype), branch
        self.merged += 1
        self.altered = True
        self._kept, self._whole = self._kept + kept, self._whole + whole
        return stored, None

    def changes(self, name: str) -> bool:
        """Whether a parameter is changed by any of them."""
        return self.adapters.changes(name)

    def attach(self, module: nn.Module, path: str, branch: Branch) -> None:
        """Makes a branch run with the layer at this path of the module."""
        attach_branch(module, path, branch)

    def vector(self, name: str, value: mx.array) -> mx.array:
        """A changed bias or norm weight, (n,); fp32, evaluated."""
        self.altered = True
        return self.adapters.apply(name, value)

    def _branch(self, path: str, dtype: mx.Dtype) -> Branch | None:
        branch = self.adapters.branch(path, dtype)
        if branch is not None:
            self.unmerged += 1
        return branch

    def log_placement(self) -> None:
        """Logs how many matrices have merged and unmerged LoRAs, and the share of the merged change that was kept."""
        share = 1.0 if self.share_kept is None else self.share_kept  # nothing merged, nothing lost
        if self.merged:
            logger.log(
                logging.INFO if share >= _ENOUGH else logging.WARNING,
                "merged into %d matrices; %.1f%% of the change is in the stored weights", self.merged, 100 * share,
            )  # fmt: skip
        if self.unmerged:
            logger.info("running unmerged with %d matrices", self.unmerged)
        changed = sum(self.adapters.changes(f"{path}.weight") for path in self.adapters.paths)
        if rest := changed - self.merged - self.unmerged:
            logger.info("the other %d are merged where the modulation is made, which loses nothing", rest)


def _store(value: mx.array, scheme: Scheme | None, dtype: mx.Dtype) -> mx.array | Packed:
    """A matrix as it is stored, evaluated."""
    stored = value.astype(dtype) if scheme is None else quantize_matrix(value, scheme)
    mx.eval(stored.arrays if isinstance(stored, Packed) else stored)
    return stored


def _survival(base: mx.array, changed: mx.array, stored: mx.array | Packed) -> tuple[float, float]:
    """<stored - base, change> and <change, change>: how much of a change is stored, and all of it."""
    back = stored.dequantize() if isinstance(stored, Packed) else stored.astype(mx.float32)
    change = changed - base
    kept, whole = ((back - base) * change).sum(), mx.square(change).sum()
    finish(kept, whole)
    return kept.item(), whole.item()
