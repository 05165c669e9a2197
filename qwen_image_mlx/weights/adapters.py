"""LoRAs on their way into a model: merged into the weights, or run beside them.

Merged in fp32, before anything is rounded or packed, a LoRA costs nothing at run time. Where the stored weights could
not hold its change, because they are packed already or too coarse for it, it runs beside them as one low-rank branch
for all LoRAs together.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

import mlx.core as mx

from ..errors import CheckpointError, RequestError
from ..variants import LORA_MODES
from .lora import LoRA, Update
from .packed import Packed
from .quantize import Scheme, quantize_matrix

logger = logging.getLogger(__name__)

_ENOUGH = 0.9  # of a change must survive in the stored weights, or "auto" runs it beside them

Branch = tuple[mx.array, mx.array]


class Adapters:
    """Several LoRAs for one model.

    Args:
        loras: in any order; what they change adds up.
        mode: "merge" merges, "side" runs them beside the weights, "auto" merges unless the stored weights would lose
            the change.
        references: how they were named, for the record.

    Raises:
        RequestError: the mode is another.
    """

    def __init__(self, loras: Sequence[LoRA], mode: str = "auto", references: Sequence[str] = ()):
        if mode not in LORA_MODES:
            raise RequestError(f"the LoRA mode is {mode!r}, but must be one of {', '.join(LORA_MODES)}")
        self.loras = tuple(loras)
        self.mode = mode
        self.references = tuple(references)
        self.altered = False  # a resident weight holds some of it
        self.merged = 0
        self.beside = 0
        self._kept = self._asked = 0.0
        for lora in loras:
            logger.info(
                "LoRA %s at %g: changes %d of %d matrices", lora.path.name, lora.strength, lora.matched, lora.total
            )
            if lora.unmatched:
                shown = ", ".join(lora.unmatched[:5]) + (", …" if len(lora.unmatched) > 5 else "")
                logger.warning(
                    "LoRA %s: %d of its tensors belong to nothing in this model and do nothing: %s",
                    lora.path.name, len(lora.unmatched), shown,
                )  # fmt: skip

    @property
    def share_kept(self) -> float | None:
        """How much of what was merged is in the stored weights: <stored - W, change> / <change, change>."""
        return self._kept / self._asked if self._asked else None

    def updates(self, path: str) -> list[Update]:
        """What the LoRAs do to a module, by its canonical name."""
        return [lora.updates[path] for lora in self.loras if path in lora.updates]

    def changes(self, name: str) -> bool:
        """Whether a parameter is changed by any of them."""
        path, _, parameter = name.rpartition(".")
        if parameter == "weight":
            return any(update.changes_weight or update.is_dora for update in self.updates(path))
        return parameter == "bias" and any(update.bias_delta() is not None for update in self.updates(path))

    def apply(self, name: str, value: mx.array) -> mx.array:
        """A parameter with all changes, fp32, evaluated."""
        path, _, parameter = name.rpartition(".")
        base = value.astype(mx.float32)
        updates = self.updates(path)
        deltas = [update.delta(base) if parameter == "weight" else update.bias_delta() for update in updates]
        changed = sum((delta for delta in deltas if delta is not None), base)
        mx.eval(changed)
        return changed

    def check(self, packed: Collection[str]) -> None:
        """Finds out, reading nothing, whether everything can be merged or run beside.

        Args:
            packed: the modules, by canonical name, whose weights are packed already.

        Raises:
            CheckpointError: a change of a packed weight cannot run beside it, or is to be merged.
        """
        for lora in self.loras:
            for path, update in lora.updates.items():
                if not (update.changes_weight or update.is_dora) or path not in packed:
                    continue
                if self.mode == "merge":
                    raise CheckpointError(
                        f"a LoRA cannot be merged into the packed weights of {path}: packing them again would lose it; "
                        "let it run beside them (--lora-mode side), or merge it into the model they were packed from"
                    )
                if not update.has_factors:
                    raise CheckpointError(
                        f"the change of {path} by {lora.path.name} cannot run beside packed weights, as a plain LoRA's "
                        "could: use the model they were packed from, with --quantize"
                    )

    def place(
        self, name: str, value: mx.array | Packed, scheme: Scheme | None, dtype: mx.Dtype
    ) -> tuple[mx.array | Packed, Branch | None]:
        """A matrix as it is to be stored, and what runs beside it.

        Args:
            name: the weight's canonical name; one that is changed.
            value: as it is read: dense, or packed already, which `check` has allowed.
            scheme: what it is packed into; None stores it dense.
            dtype: what it is stored in when dense.

        Returns:
            The weight, dense in `dtype` or packed, and A (r, in), B (out, r) in `dtype` or None; evaluated.
        """
        path = name.removesuffix(".weight")
        if isinstance(value, Packed):
            return value, self._branch(path, dtype)
        base = value.astype(mx.float32)
        if self.mode == "side" and (branch := self._branch(path, dtype)):
            return _stored(base, scheme, dtype), branch
        changed = self.apply(name, base)
        stored = _stored(changed, scheme, dtype)
        kept, asked = _survival(base, changed, stored)
        if self.mode == "auto" and kept < _ENOUGH * asked and (branch := self._branch(path, dtype)):
            return _stored(base, scheme, dtype), branch
        self.merged += 1
        self.altered = True
        self._kept, self._asked = self._kept + kept, self._asked + asked
        return stored, None

    def branches(self, dtype: mx.Dtype) -> dict[str, Branch] | None:
        """What runs beside each changed module if everything does; None if something cannot."""
        paths = {path for lora in self.loras for path in lora.updates}
        pairs = {path: [update.factors() for update in self.updates(path)] for path in paths}
        if any(None in found or self.changes(f"{path}.bias") for path, found in pairs.items()):
            return None
        return {path: stack_branches(found, dtype) for path, found in pairs.items()}

    def _branch(self, path: str, dtype: mx.Dtype) -> Branch | None:
        pairs = [update.factors() for update in self.updates(path)]
        if None in pairs:
            return None
        branch = stack_branches(pairs, dtype)
        mx.eval(branch)
        self.beside += 1
        return branch

    def say_what_became(self) -> None:
        """Logs how many matrices were merged and run beside, and how much of the merged change survived."""
        share = 1.0 if self.share_kept is None else self.share_kept  # nothing asked, nothing lost
        if self.merged:
            logger.log(
                logging.INFO if share >= _ENOUGH else logging.WARNING,
                "merged into %d matrices; %.1f%% of the change is in the stored weights", self.merged, 100 * share,
            )  # fmt: skip
        if self.beside:
            logger.info("running beside %d matrices", self.beside)


def stack_branches(pairs: Iterable[Branch], dtype: mx.Dtype) -> Branch:
    """Several branches as one: their ranks one after another."""
    a, b = zip(*pairs, strict=True)
    return mx.concatenate(a, axis=0).astype(dtype), mx.concatenate(b, axis=1).astype(dtype)


def _stored(value: mx.array, scheme: Scheme | None, dtype: mx.Dtype) -> mx.array | Packed:
    """A matrix as it is stored, evaluated."""
    stored = value.astype(dtype) if scheme is None else quantize_matrix(value, scheme)
    mx.eval(stored.arrays if isinstance(stored, Packed) else stored)
    return stored


def _survival(base: mx.array, changed: mx.array, stored: mx.array | Packed) -> tuple[float, float]:
    """<stored - base, change> and <change, change>: what is stored of a change, and what was asked."""
    back = stored.dequantize() if isinstance(stored, Packed) else stored.astype(mx.float32)
    change = changed - base
    return ((back - base) * change).sum().item(), mx.square(change).sum().item()
