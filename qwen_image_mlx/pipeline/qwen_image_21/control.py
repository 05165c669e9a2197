"""What the Fun ControlNet adds to the sequence of Qwen-Image-2.1; made once for an image."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx

from ...models.qwen_image_21.control import Added
from ...models.qwen_image_21.denoiser import Denoiser
from ...models.qwen_image_21.transformer import Hint
from ...registry import TRANSFORMER
from ..components import Components
from ..reporter import Reporter
from ..seams import Conditions, ControlInput

logger: logging.Logger = logging.getLogger(__name__)


class FunBranch:
    """A `ControlBranch`: its hints are added after evenly spaced blocks, to text and references too."""

    def __init__(
        self, components: Components, conditions: Conditions, control: ControlInput, steered: Denoiser, report: Reporter
    ):
        logger.info("with a ControlNet, text and references are computed again in every step")
        self._steered = steered
        self._network = components.network(control.role)
        self._pace = components.pace(control.role)
        self._every = -(-components.depth(TRANSFORMER) // components.depth(control.role))
        self._scale = mx.array(control.scale, dtype=components.dtype)
        self._condition = self._network.project_condition(control.tokens.astype(components.dtype))
        mx.eval(self._condition)

    def hint(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Hint:
        """The hints of one evaluation, of (block, branch)."""
        steered = self._steered
        hints = self._network(
            steered.project(latents), self._condition, steered.prefixes[:branches], steered.rows(evaluation),
            steered.still, self._pace,
        )  # fmt: skip
        scaled = [[Added(*(self._scale * part for part in added)) for added in of_block] for of_block in hints]

        def hint(block: int, branch: int) -> Added | None:
            number, between = divmod(block, self._every)
            return None if between else scaled[number][branch]

        return hint

    @staticmethod
    def kept_values(config: Any, evaluations: int, tokens: int, branches: int) -> int:
        """The condition, and a step's hints for the target."""
        values: int = (config.num_layers * branches + 1) * tokens * config.dim
        return values
