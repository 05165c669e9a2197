"""Opens a checkpoint: the arguments of `QwenImagePipeline.from_pretrained`, checked, to its parts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import mlx.core as mx

from ..errors import RequestError
from ..names import Dtype, LoRAMode, StrPath
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot
from .components import Components
from .loras import LoRAReference, profile_of, read_adapters
from .parameters import DTYPES, Recommended
from .progress import Progress, Reporter


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
    """The parts of a checkpoint, nothing of it loaded.

    Args:
        report: told of downloads, loading and layers.
        files: by folder, what stands in for the checkpoint's own.
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
    snapshot = HubSnapshot(
        model,
        revision=revision,
        offline=offline,
        progress=lambda name, done, total: report(Progress("download", done, total, name)),
    )
    return Components(
        snapshot,
        getattr(mx, dtype),
        lambda name: report.stage("load", name),
        zero_cond_t=zero_cond_t,
        quantization=quantize,
        read_loras=partial(read_adapters, loras, lora_mode, offline=offline, report=report) if loras else None,
        replaced={folder: path for folder, path in files.items() if path is not None},
        streamed=streamed,
        on_layer=lambda name, layer, layers: report(Progress("layer", layer, layers, name)),
    )


def replace_loras(components: Components, report: Reporter, loras: Sequence[LoRAReference], mode: LoRAMode) -> None:
    """The work of `QwenImagePipeline.set_loras`; its arguments and errors."""
    adapters = None
    if loras:
        targets, offline = components.lora_targets(), components.snapshot.offline
        adapters = read_adapters(loras, mode, targets, offline=offline, report=report)
    components.replace_adapters(adapters)


def recommended_of(components: Components) -> Recommended:
    """How a checkpoint wants to be sampled: as its card says, or as a distilled LoRA was trained."""
    profile = profile_of(components.adapters.loras) if components.adapters else None
    if profile is None:
        return Recommended(components.variant.steps, components.variant.cfg_scale, None)
    return Recommended(profile.steps, profile.cfg_scale, profile.shift)
