"""The seam at which generations of the model differ in training; `registry.py` finds it by the transformer's class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import mlx.core as mx

from ..errors import RequestError
from ..models import nn
from ..pipeline.conditioning import Reference
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.seams import DenoiserClass, TrainedDenoisers
from ..registry import CLASSES, TRANSFORMER, resolve
from ..weights.changes import WeightChanges
from ..weights.loader import ComponentWeights

# A sample's images: (what tells it from others, rows, columns) of each, the target's frames before the references.
Segments = tuple[tuple[int, int, int], ...]
# Indices of noise levels to what the network takes as a batch's modulation.
Table = Callable[[Sequence[int]], Any]


class Trainable(Protocol):
    """What training has to know of a generation's transformer."""

    def segments(self, config: Any, grids: Sequence[tuple[int, int]], references: Sequence[Reference]) -> Segments:
        """The images of a sample: rows and columns of the target's frames, then the references."""

    def network(self, transformer: nn.Module, config: Any, modulation: nn.Module | None, checkpointing: bool) -> Any:
        """The network in training, its transformer as `transformer` and a trained modulation as `modulation`.

        It is called with noisy latents, states, sigmas, the tables that its `rotary` makes of a batch, references and
        the modulation of `table` (None if it is trained), and returns velocities.
        """

    def modulation(self, config: Any) -> nn.Module:
        """The modulation, with the checkpoint's names, its parameters zeros."""

    def table(
        self,
        folder: Path,
        weights: ComponentWeights,
        sigmas: mx.array,
        levels: Sequence[int],
        dtype: mx.Dtype,
        adapters: WeightChanges | None,
        fingerprint: str,
    ) -> Table:
        """The frozen modulation of the noise levels that a run draws.

        Args:
            folder: for what is kept on disk.
            weights: the transformer's.
            sigmas: every noise level (N,).
            levels: the indices that are drawn.
            dtype: of the rows.
            adapters: LoRAs, merged on the way.
            fingerprint: identifies the weights' files.
        """

    def denoisers(self, modulation: nn.Module, dtype: mx.Dtype) -> DenoiserClass:
        """Makes denoisers whose modulation is in training."""


class GenerationTraining:
    """What is the same in every generation's `Trainable`, from classes that each one names.

    Attributes:
        network_class: a `TrainingNetwork`.
        modulation_class: made from the transformer's config.
        denoiser_class: takes the modulation of all steps as `rows`, instead of reading it.
        rows_of_steps: (modulation, sigmas (S,), dtype) to what `denoiser_class` takes for these noise levels.
    """

    network_class: ClassVar[Callable[..., nn.Module]]
    modulation_class: ClassVar[Callable[[Any], nn.Module]]
    denoiser_class: ClassVar[Any]
    rows_of_steps: ClassVar[Callable[..., Any]]

    def network(self, transformer: nn.Module, config: Any, modulation: nn.Module | None, checkpointing: bool) -> Any:
        """As `Trainable.network`."""
        return self.network_class(transformer, config, modulation, checkpointing=checkpointing)

    def modulation(self, config: Any) -> nn.Module:
        """As `Trainable.modulation`."""
        return self.modulation_class(config)

    def denoisers(self, modulation: nn.Module, dtype: mx.Dtype) -> DenoiserClass:
        """As `Trainable.denoisers`."""
        return TrainedDenoisers(self.denoiser_class, partial(self.rows_of_steps, modulation, dtype=dtype))


def trainable_of(pipeline: QwenImagePipeline) -> Trainable:
    """The seam of a pipeline's transformer; raises RequestError if it cannot be trained."""
    place = CLASSES[pipeline.variant.classes[TRANSFORMER]].training
    if not place:
        raise RequestError(f"{pipeline.model} cannot be trained: use another model")
    return cast(Trainable, resolve(place)())
