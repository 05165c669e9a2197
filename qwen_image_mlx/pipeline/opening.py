"""Opens a checkpoint: checks the arguments of `QwenImagePipeline.from_pretrained` and makes its components."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import RequestError
from ..names import Dtype, LoRAMode, StrPath
from ..registry import TRANSFORMER
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot
from .components import Components
from .parameters import DTYPES, Recommended
from .progress import Progress
from .reporter import Reporter

if TYPE_CHECKING:
    from ..lora.adapters import Adapters
    from ..lora.distillations import Distillation
    from ..lora.fetch import LoRAReference


_DISTILLED = re.compile(r"distill|rapid[-_]?aio", re.IGNORECASE)  # names of whole models that may be a family's


def open_components(
    model: StrPath,
    report: Reporter,
    *,
    revision: str | None,
    dtype: Dtype,
    offline: bool,
    zero_cond_t: bool | None,
    quantize: Quantization | str | int | None,
    loras: Sequence[LoRAReference],
    lora_mode: LoRAMode,
    files: Mapping[str, StrPath | None],
    streamed: Collection[str],
) -> Components:
    """The components of a checkpoint; none is loaded.

    Args:
        report: receives downloads, loading and layers.
        files: files that replace the checkpoint's own, keyed by folder.
        model, revision, dtype, offline, zero_cond_t, quantize, loras, lora_mode, streamed: as in `from_pretrained`.

    Raises:
        RequestError, HubError, CheckpointError: as `from_pretrained`.
    """
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise RequestError(f"model is {model!r:.80}, but must be a directory or a model's id")
    if isinstance(quantize, str | int) and not isinstance(quantize, bool):
        quantize = Quantization.parse(quantize)
    if not isinstance(quantize, Quantization | None):
        raise RequestError(f"quantize is {quantize!r:.80}, but must be bits, component=bits, or None")
    if dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    snapshot = HubSnapshot(model, revision=revision, offline=offline, progress=report.download)
    return Components(
        snapshot,
        getattr(mx, dtype),
        lambda name: report.stage("load", name),
        zero_cond_t=zero_cond_t,
        quantization=quantize,
        read_loras=_lora_reader(loras, lora_mode, offline, report) if loras else None,
        replaced={folder: path for folder, path in files.items() if path is not None},
        streamed=streamed,
        on_layer=lambda name, layer, layers: report(Progress("layer", layer, layers, name)),
    )


def replace_loras(components: Components, report: Reporter, loras: Sequence[LoRAReference], mode: LoRAMode) -> None:
    """The work of `QwenImagePipeline.set_loras`; its arguments and errors."""
    adapters = None
    if loras:
        adapters = _lora_reader(loras, mode, components.snapshot.offline, report)(components.lora_targets())
    components.replace_adapters(adapters)


def recommended_of(components: Components, steps: int | None = None) -> Recommended:
    """The recommended sampling of a checkpoint, its model card's or a distilled LoRA's; for some steps if given."""
    distilled = distillation(components)
    if distilled is None:
        variant = components.variant
        return Recommended(variant.steps if steps is None else steps, variant.cfg_scale, None, None, True)
    found = distilled.at(steps)
    return Recommended(found.steps, found.cfg_scale, found.static_shift, found.sigmas, found.stretch)


def is_distilled(components: Components) -> bool:
    """Whether a checkpoint, or one of its LoRAs, was trained for a few steps of its own."""
    return bool(components.variant.sigmas) or distillation(components) is not None


def distillation(components: Components) -> Distillation | None:
    """How a checkpoint is sampled that, or a LoRA on which, was distilled; None for all others.

    A LoRA knows by itself. A whole model, or a file in place of its transformer, is known by its name.
    """
    if components.adapters and components.adapters.distillation:
        return components.adapters.distillation
    names = [str(components.snapshot.model), str(components.sources.replaced.get(TRANSFORMER, ""))]
    if not any(map(_DISTILLED.search, names)):
        return None
    from ..lora.distillations import named_distillation  # here: most models are not distilled

    return next(filter(None, map(named_distillation, names)), None)


def _lora_reader(
    loras: Sequence[LoRAReference], mode: LoRAMode, offline: bool, report: Reporter
) -> Callable[[Mapping[str, tuple[int, ...]]], Adapters]:
    """A function that reads the LoRAs, given the modules they may change and their weights' shapes."""
    from ..lora.fetch import read_adapters  # here: most runs have no LoRA

    return partial(read_adapters, loras, mode, offline=offline, download=report.download)
