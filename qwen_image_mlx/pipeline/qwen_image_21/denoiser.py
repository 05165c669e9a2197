"""The velocities of Qwen-Image-2.1 for one image: one modulation for all blocks, and the prefix kept between steps.

It stands above `models/` because it reads weights: what turns timesteps into modulation is loaded, used for all steps
at once, and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

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
from ...models.qwen_image_21.transformer import Rows
from ...registry import TRANSFORMER
from ...weights.loader import load_module
from ..components import Components
from ..reporter import Reporter
from ..seams import Conditions, Controls
from .costs import COSTS

_TABLE = "modulation table"
_ROWS = len(Rows._fields)  # numbers of a timestep for each channel


class QwenImage21Denoiser:
    """The `Denoiser` of Qwen-Image-2.1.

    Args:
        components, conditions, report: as `DenoiserClass` says.
    """

    costs: ClassVar = COSTS

    def __init__(self, components: Components, conditions: Conditions, report: Reporter):
        *table, still = _table(components, conditions.sigmas, report)
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
        self._controls = Controls(components, conditions, self._denoiser, report)

    def velocities(self, latents: mx.array, evaluation: int, on_layer: OnLayer | None = None) -> Sequence[mx.array]:
        """As `Denoiser.velocities`; the first call also computes the prefix."""
        return self._denoiser.velocities(latents, evaluation, on_layer, self._controls.hints(latents, evaluation))

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


def _branches(conditions: Conditions) -> list[Condition]:
    """Each encoded prompt, with the places of the references in it.

    Raises:
        RequestError: a reference has no place.
    """
    starts = [shown.start for shown in conditions.references if shown.start is not None]
    if len(starts) != len(conditions.references):
        raise RequestError("the encoding does not say where its images stand in the prompt: encode it with this model")
    return [Condition(states, tuple(starts)) for states in conditions.branches]


def _table(components: Components, sigmas: np.ndarray, report: Reporter) -> list[Rows]:
    """The rows of every evaluation, and at the end those of timestep 0; kept for other images of the same schedule."""
    kept = components.kept
    if _TABLE not in kept or not np.array_equal(kept[_TABLE][0], sigmas):
        kept.pop(_TABLE, None)
        with report.stage("load", "modulation"):
            adapters = components.adapters
            placement = adapters.placement() if adapters else None
            (part,) = components.rows[TRANSFORMER].transient
            network = TimeModulation(components.config(TRANSFORMER))
            weights = components.weights(TRANSFORMER)
            network = load_module(network, weights, part, components.dtype, None, placement)
            made = network.table(mx.array([*sigmas.tolist(), 0.0]), components.dtype)
            mx.eval(made)
        kept[_TABLE] = sigmas, made
    table: list[Rows] = kept[_TABLE][1]
    return table
