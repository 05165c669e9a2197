"""Describes a LoRA in lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..errors import some
from ..outside import one_line
from .distillations import distillation_of
from .file import LoRA
from .update import Update

_METADATA_KEYS = (
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.architecture", "modelspec.trigger_phrase",
    "modelspec.usage_hint", "ss_output_name", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "name", "title", "version", "software", "base_model",
)  # fmt: skip
_MAX_CHARACTERS = 200


def describe(lora: LoRA) -> list[tuple[str, str]]:
    """What a LoRA is, as rows (label, text); reads nothing beyond what `read_lora` has read."""
    updates = lora.updates.values()
    distilled = distillation_of(lora)
    kinds = Counter(_kind_names(updates))
    ranks = Counter(str(update.rank) for update in updates if update.rank)
    scales = Counter(f"{update.scale:g}" for update in updates if update.kind)
    groups = Counter(_group(update.target) for update in updates)
    dtypes = Counter(tensor.dtype for update in updates for tensor in update.tensors.values())
    source = "PEFT settings" if lora.peft else "alpha tensors" if _has_alphas(lora) else "no alpha in the file"
    rows = [
        ("file", str(lora.path)),
        ("bytes", str(lora.nbytes)),
        ("dialect", ", ".join(lora.dialects)),
        ("kinds", _count_list(kinds)),
        ("strength", f"{lora.strength:g}" if lora.strength != 1 else ""),
        ("targets", f"{lora.matched} of {lora.total}"),
        ("rank", _count_list(ranks)),
        ("alpha / rank", f"{_count_list(scales)} ({source})" if scales else ""),
        ("changes", _count_list(groups)),
        ("dtype", _count_list(dtypes)),
        ("unmatched", f"{len(lora.unmatched)}: {some(lora.unmatched)}" if lora.unmatched else ""),
        (
            "distilled",
            f"{distilled.steps} steps, cfg {distilled.cfg_scale:g}, by {distilled.evidence}" if distilled else "",
        ),
    ]
    chosen = ((key, lora.metadata[key]) for key in _METADATA_KEYS if key in lora.metadata)
    rows += [(f"metadata {key}", one_line(text, _MAX_CHARACTERS)) for key, text in chosen]
    return [(label, text) for label, text in rows if text]


def _kind_names(updates: Iterable[Update]) -> Iterable[str]:
    for update in updates:
        if update.kind:
            yield f"{update.kind} with magnitudes (DoRA)" if update.is_dora else update.kind
        for role, name in (("difference", "difference"), ("replacement", "replacement")):
            if role in update.tensors:
                yield name
        if update.changes_bias:
            yield "bias"


def _has_alphas(lora: LoRA) -> bool:
    return any("alpha" in update.tensors for update in lora.updates.values())


def _group(target: str) -> str:
    """The target with its block's number taken out."""
    return ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(target.split(".")))


def _count_list(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())
