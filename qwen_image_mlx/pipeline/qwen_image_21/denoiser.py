"""The velocities of Qwen-Image-2.1 for one image: one modulation for all blocks, and the prefix kept between steps.

It stands above `models/` because it reads weights: what turns timesteps into modulation is loaded, used for all steps
at once, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...errors import RequestError
from ...models.layers import OnLayer
from ...models.qwen_image_21.config import TransformerConfig
from ...models.qwen_image_21.denoiser import (
    Condition,
    Denoiser,
    check_positions,
    kept_values,
    prefix_runs,
)
from ...models.qwen_image_21.denoiser import Reference as Shown
from ...models.qwen_image_21.modulation import TimeModulation
from ...models.qwen_image_21.transformer import Hidden, Rows
from ...registry import TRANSFORMER
from ...weights.changes import WeightChanges
from ...weights.loader import ComponentWeights, fill, specs_of
from ...weights.tensor_formats import Reader
from ..components import Components
from ..reporter import Reporter
from ..seams import Conditions, ControlledDenoiser, Controls
from .costs import COSTS

# From noise levels to their rows and, at the end, those of timestep 0; a network in training has this instead of files.
StepRows = Callable[[np.ndarray], list[Rows]]

_TABLE = "modulation table"
_ROWS = len(Rows._fields)  # numbers of a timestep for each channel


class QwenImage21Denoiser(ControlledDenoiser):
    """The `Denoiser` of Qwen-Image-2.1.

    Args:
        components, conditions, report: as `DenoiserClass` says.
        rows: makes the modulation if it is not read from the checkpoint's files.
    """

    costs: ClassVar = COSTS
    keeps_prefix: ClassVar = True

    def __init__(
        self,
        components: Components,
        conditions: Conditions,
        report: Reporter,
        *,
        rows: StepRows | None = None,
    ):
        made = _table(components, conditions.sigmas, report) if rows is None else rows(conditions.sigmas)
        *table, still = made
        self._denoiser = Denoiser(
            components.network(TRANSFORMER),
            components.config(TRANSFORMER),
            table=table,
            still=still,
            conditions=_branches(conditions),
            references=[Shown(shown.latents, shown.height, shown.width) for shown in conditions.references],
            grid=(conditions.rows, conditions.columns),
            dtype=components.dtype,
            keep_prefix=conditions.keeps_prefix and not conditions.controls,
        )
        mx.eval(self._denoiser.prepared)
        super().__init__(Controls(components, conditions, self._denoiser, report))

    def _enter(self, latents: mx.array, branches: int | None) -> Hidden:
        return self._denoiser.enter(latents, branches)

    def _run(
        self, hidden: Hidden, evaluation: int, blocks: slice, on_layer: OnLayer | None, hints: list[Callable[..., Any]]
    ) -> Hidden:
        return self._denoiser.run(hidden, evaluation, blocks, on_layer, hints)

    def leave(self, hidden: Hidden, evaluation: int) -> Sequence[mx.array]:
        """As `Denoiser.leave`."""
        return self._denoiser.leave(hidden, evaluation)

    def signal(self, hidden: Hidden, evaluation: int) -> mx.array:
        """As `Denoiser.signal`."""
        return self._denoiser.signal(hidden, evaluation)

    @staticmethod
    def check(components: Components, conditions: Conditions) -> None:
        """As `DenoiserClass.check`."""
        config: TransformerConfig = components.config(TRANSFORMER)
        dim = config.context_in_dim
        for states in conditions.branches:
            if states.ndim != 3 or states.shape[0] != 1 or states.shape[2] != dim:
                raise RequestError(
                    f"the encoding has the shape {tuple(states.shape)}, but this model needs (1, tokens, {dim})"
                )
        grids = [(shown.height, shown.width) for shown in conditions.references]
        try:
            for branch in _branches(conditions):
                check_positions(prefix_runs(branch, grids), (conditions.rows, conditions.columns))
        except ValueError as error:
            raise RequestError(f"{error}; shorten the prompt, or make the images smaller or fewer") from error

    @staticmethod
    def kept_values(config: TransformerConfig, evaluations: int, prefix_tokens: int, branches: int) -> int:
        """As `DenoiserClass.kept_values`: the prefixes' keys and values, and a few rows for each evaluation."""
        return kept_values(config, prefix_tokens, branches) + _ROWS * config.dim * (evaluations + 1)

    @staticmethod
    def pass_flop(config: TransformerConfig, target_tokens: int, prefix_tokens: int) -> float:
        """As `DenoiserClass.pass_flop`: the target alone runs, and sees the kept prefix."""
        weights = 4.0 * config.dim**2 + 3.0 * config.dim * config.inner_dim
        seen = 4.0 * target_tokens * (target_tokens + prefix_tokens) * config.dim
        return config.num_layers * (2 * weights * target_tokens + seen)


def _branches(conditions: Conditions) -> list[Condition]:
    """Each encoded prompt, with the places of the references in it.

    Raises:
        RequestError: a reference has no place.
    """
    starts = [shown.start for shown in conditions.references if shown.start is not None]
    if len(starts) != len(conditions.references):
        raise RequestError("the encoding does not say where its images stand in the prompt: encode it with this model")
    return [Condition(states, tuple(starts)) for states in conditions.branches]


def load_modulation(
    weights: ComponentWeights, dtype: mx.Dtype, adapters: WeightChanges | None = None
) -> TimeModulation:
    """The network of the modulation, with LoRAs; raises CheckpointError if its weights cannot be read."""
    (part,) = weights.component.transient
    network = TimeModulation(weights.config)
    placement = adapters.placement() if adapters else None
    fill(network, weights, specs_of(network, weights, part, None), Reader(TRANSFORMER), dtype, None, placement)
    return network


def _table(components: Components, sigmas: np.ndarray, report: Reporter) -> list[Rows]:
    """The rows of every evaluation, and at the end those of timestep 0; kept for other images of the same schedule."""
    kept = components.kept
    if _TABLE not in kept or not np.array_equal(kept[_TABLE][0], sigmas):
        kept.pop(_TABLE, None)
        with report.stage("load", "modulation"):
            network = load_modulation(components.weights(TRANSFORMER), components.dtype, components.adapters)
            made = network.table(mx.array([*sigmas.tolist(), 0.0]), components.dtype)
            mx.eval(made)
        kept[_TABLE] = sigmas, made
    table: list[Rows] = kept[_TABLE][1]
    return table
