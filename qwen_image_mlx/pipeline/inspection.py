"""What a checkpoint is, what it holds and what it will cost, told from configs and headers alone."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..names import StrPath
from ..registry import LANGUAGE_HEAD, TRANSFORMER, VAE
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot
from .components import Components


@dataclass(frozen=True)
class ComponentReport:
    """One component of a checkpoint.

    Attributes:
        name: its role, such as `registry.TRANSFORMER`.
        file_bytes: its weights in the files.
        forms: how they lie there, and how many bytes so.
        resident_bytes: what it takes in memory once it is loaded.
    """

    name: str
    file_bytes: int
    forms: dict[str, int]
    resident_bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint.

    Attributes:
        model: where it is.
        class_name: its pipeline class.
        task: what it is for: "generate", "edit" or "decompose"; several with commas.
        licence: of the released weights of its kind.
        blocks: of its transformer.
        components: its parts.
    """

    model: str
    class_name: str
    task: str
    licence: str
    blocks: int
    components: tuple[ComponentReport, ...]

    @property
    def encoding_bytes(self) -> int:
        """What is in memory while prompts and images are encoded."""
        return sum(c.resident_bytes for c in self.components if c.name != TRANSFORMER)

    @property
    def generating_bytes(self) -> int:
        """What is in memory while it generates and decodes, apart from the image itself."""
        return sum(c.resident_bytes for c in self.components if c.name in (TRANSFORMER, VAE))


def inspect_checkpoint(
    model: StrPath, *, revision: str | None = None, dtype: mx.Dtype = mx.bfloat16,
    quantization: Quantization | None = None,
) -> CheckpointReport:  # fmt: skip
    """Reads a checkpoint's configs and headers.

    Args:
        model, revision: as in `QwenImagePipeline.from_pretrained`; what a hub model lacks is downloaded.
        dtype: what it would be run in.
        quantization: what it would be packed into while it is loaded.

    Raises:
        CheckpointError: the files are not those of a pipeline this package runs.
        HubError: they cannot be fetched.
    """
    components = Components(HubSnapshot(model, revision=revision), dtype, quantization=quantization)
    reports = []
    for name in (*components.encoders, TRANSFORMER, VAE):
        if name == LANGUAGE_HEAD:  # which is there for captions alone
            continue
        weights, component = components.weights(name), components.rows[name]
        own, scheme = mx.float32 if component.full_precision else dtype, getattr(components.quantization, name, None)
        resident = sum(weights.resident_bytes(part, own, scheme) for part in component.resident)
        reports.append(ComponentReport(name, weights.nbytes, weights.forms, resident))
    return CheckpointReport(
        str(model),
        str(components.sources.index.get("_class_name")),
        ", ".join(components.variant.tasks),
        components.variant.licence,
        components.depth(TRANSFORMER),
        tuple(reports),
    )
