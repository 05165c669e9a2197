"""The `Trainable` of Qwen-Image 1.x: its network, and the rows of its modulation on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ...models.qwen_image.config import TransformerConfig
from ...models.qwen_image.modulation import TimeModulation
from ...models.qwen_image.rope import place_images
from ...models.qwen_image.transformer import Modulation, Transformer
from ...pipeline.conditioning import Reference
from ...pipeline.qwen_image.denoiser import TrainedDenoisers
from ...weights.changes import WeightChanges
from ...weights.loader import ComponentWeights
from ..network import Network
from ..seam import Segments
from ..table import LevelTable


class QwenImageTraining:
    """See `Trainable`."""

    def segments(
        self, config: TransformerConfig, grids: Sequence[tuple[int, int]], references: Sequence[Reference]
    ) -> Segments:
        """Segments with the frame of each image."""
        whole = [*grids, *((reference.height, reference.width) for reference in references)]
        return tuple(place_images(whole, config.use_layer3d_rope))

    def network(
        self,
        transformer: Transformer,
        config: TransformerConfig,
        modulation: TimeModulation | None,
        checkpointing: bool,
    ) -> Network:
        """The network in training."""
        return Network(transformer, config, modulation, checkpointing=checkpointing)

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
    ) -> LevelTable:
        """The rows of the drawn levels, on disk."""
        still = weights.config.zero_cond_t
        return LevelTable(folder, weights, sigmas, levels, dtype, still, adapters, fingerprint)

    def denoisers(self, modulation: TimeModulation, dtype: mx.Dtype) -> TrainedDenoisers:
        """Denoisers with the trained modulation."""
        return TrainedDenoisers(partial(rows_of_steps, modulation, dtype=dtype))


def rows_of_steps(modulation: TimeModulation, sigmas: np.ndarray, dtype: mx.Dtype) -> list[Modulation]:
    """The modulation at every noise level, sigmas (S,), equal to `modulation_table`'s, which reads files."""
    rows = modulation(mx.array(sigmas), dtype)
    mx.eval(rows)

    def of_step(step: int) -> Modulation:
        return tree_map(lambda row: row[step, 0] if row.ndim == 3 else row, rows)

    table = [of_step(step) for step in range(len(sigmas))]
    mx.eval(table)
    return table
