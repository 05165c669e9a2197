"""The `Trainable` of Qwen-Image-2.1: its network, and the rows of its modulation, few enough to stay in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...models.qwen_image_21.config import TransformerConfig
from ...models.qwen_image_21.modulation import TimeModulation
from ...models.qwen_image_21.transformer import Rows, Transformer
from ...pipeline.conditioning import Reference
from ...pipeline.qwen_image_21.denoiser import TrainedDenoisers, load_modulation
from ...weights.changes import WeightChanges
from ...weights.loader import ComponentWeights
from ..seam import Segments
from .network import Modulated, Network21


class QwenImage21Training:
    """See `Trainable`."""

    def segments(
        self, config: TransformerConfig, grids: Sequence[tuple[int, int]], references: Sequence[Reference]
    ) -> Segments:
        """The target, then each reference with the first of its places in the prompt."""
        shown = ((reference.start or 0, reference.height, reference.width) for reference in references)
        return (*((0, *grid) for grid in grids), *shown)

    def network(
        self,
        transformer: Transformer,
        config: TransformerConfig,
        modulation: TimeModulation | None,
        checkpointing: bool,
    ) -> Network21:
        """The network in training."""
        return Network21(transformer, config, modulation, checkpointing=checkpointing)

    def modulation(self, config: TransformerConfig) -> TimeModulation:
        """The modulation of a config."""
        return TimeModulation(config)

    def table(
        self,
        folder: Path,
        weights: ComponentWeights,
        sigmas: mx.array,
        levels: Sequence[int],
        dtype: mx.Dtype,
        adapters: WeightChanges | None,
        fingerprint: str,
    ) -> Levels:
        """The rows of the drawn levels, in memory."""
        return Levels(weights, sigmas, levels, dtype, adapters)

    def denoisers(self, modulation: TimeModulation, dtype: mx.Dtype) -> TrainedDenoisers:
        """Denoisers with the trained modulation."""
        return TrainedDenoisers(partial(rows_of_steps, modulation, dtype=dtype))


class Levels:
    """Rows by the index of a noise level: five of D numbers each, 41 MB for 1000 levels of the released models in bf16.

    Args:
        weights: the transformer's.
        sigmas: every noise level (N,).
        levels: the indices that are drawn.
        dtype: of the rows.
        adapters: LoRAs, merged on the way.

    Raises:
        CheckpointError: the weights could not be read.
    """

    def __init__(
        self,
        weights: ComponentWeights,
        sigmas: mx.array,
        levels: Sequence[int],
        dtype: mx.Dtype,
        adapters: WeightChanges | None = None,
    ):
        drawn = sorted({*levels})
        modulation = load_modulation(weights, dtype, adapters)
        *table, self._still = rows_of_steps(modulation, np.array(sigmas)[drawn], dtype)
        self._rows: dict[int, Rows] = dict(zip(drawn, table, strict=True))

    def __call__(self, levels: Sequence[int]) -> Modulated:
        """The rows of a batch's samples: (D,) if there is one sample, else (B, 1, D)."""
        found = [self._rows[level] for level in levels]
        own = found[0] if len(found) == 1 else Rows(*(mx.stack(rows)[:, None] for rows in zip(*found, strict=True)))
        return Modulated(own, self._still)


def rows_of_steps(modulation: TimeModulation, sigmas: np.ndarray, dtype: mx.Dtype) -> list[Rows]:
    """The rows (D,) at every noise level, sigmas (S,), and at the end those of timestep 0; evaluated."""
    table = modulation.table(mx.array([*sigmas.tolist(), 0.0]), dtype)
    mx.eval(table)
    return table
