"""Describes a checkpoint and its memory use, from configs and headers alone."""

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
    """A description of one component.

    Attributes:
        name: its role, such as `registry.TRANSFORMER`.
        file_bytes: bytes of its weights in the files.
        forms: bytes by storage format.
        resident_bytes: bytes in memory after loading.
    """

    name: str
    file_bytes: int
    forms: dict[str, int]
    resident_bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A description of a checkpoint.

    Attributes:
        model: its directory or repository id.
        class_name: its pipeline class.
        task: its task: "generate", "edit" or "decompose"; several with commas.
        licence: of the released weights of its kind.
        blocks: number of blocks of its transformer.
        components: its components.
    """

    model: str
    class_name: str
    task: str
    licence: str
    blocks: int
    components: tuple[ComponentReport, ...]

    @property
    def encoding_bytes(self) -> int:
        """Bytes of weights in memory during encoding."""
        return sum(c.resident_bytes for c in self.components if c.name != TRANSFORMER)

    @property
    def generating_bytes(self) -> int:
        """Bytes of weights in memory during generation and decoding."""
        return sum(c.resident_bytes for c in self.components if c.name in (TRANSFORMER, VAE))


def inspect_checkpoint(
    model: StrPath, *, revision: str | None = None, dtype: mx.Dtype = mx.bfloat16,
    quantization: Quantization | None = None,
) -> CheckpointReport:  # fmt: skip
    """Reads a checkpoint's configs and headers.

    Args:
        model, revision: a directory, or a repository id and its branch, tag or commit; missing headers are downloaded.
        dtype: the dtype it would run in.
        quantization: the quantization it would be loaded with.

    Raises:
        CheckpointError: the files are not those of a pipeline this package runs.
        HubError: they cannot be fetched.
    """
    components = Components(HubSnapshot(model, revision=revision), dtype, quantization=quantization)
    reports = []
    for name in (*components.encoders, TRANSFORMER, VAE):
        if name == LANGUAGE_HEAD:  # used for captions only
            continue
        weights, component = components.weights(name), components.rows[name]
        own, scheme = mx.float32 if component.full_precision else dtype, getattr(components.quantization, name, None)
        resident = sum(weights.resident_bytes(part, own, scheme) for part in component.resident)
        reports.append(ComponentReport(name, weights.nbytes, weights.forms, resident))
    return CheckpointReport(
        str(model),
        str(components.sources.index.get("_class_name")),
        ", ".join(components.variant.tasks),
        str(components.variant.licence),
        components.depth(TRANSFORMER),
        tuple(reports),
    )
