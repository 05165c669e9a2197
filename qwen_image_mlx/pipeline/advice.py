"""Warnings about requests that run, but not as the user may expect; what a model's variant says decides."""

from __future__ import annotations

import logging

from ..variants import Variant
from .control import in_window
from .request import Request

logger: logging.Logger = logging.getLogger(__name__)


def advise(request: Request, variant: Variant) -> None:
    """Warns of a request's doubtful sides.

    Args:
        request: what is generated.
        variant: of the model that generates it.
    """
    parameters = request.parameters
    width, height = parameters.width, parameters.height
    if not request.prompt.strip():
        logger.warning("the prompt is empty: the model generates whatever it likes")
    if len(request.images) > 2 and not variant.keeps_references:
        logger.warning(
            "%d reference images are given, each as costly in every step as a target of its size; fewer reference "
            "pixels make them cheaper",
            len(request.images),
        )
    steps = parameters.num_inference_steps
    for control in request.controls:
        if not control.runs or not any(in_window(control.start, control.end, step, steps) for step in range(steps)):
            logger.warning(
                "the control by %s has no effect: its scale is %g, and none of %d steps lies between %g and %g",
                control.reference, control.scale, steps, control.start, control.end,
            )  # fmt: skip
    if parameters.no_prefix_cache and not variant.keeps_references:
        logger.warning("no_prefix_cache has no effect: this model keeps nothing of the prompt between steps")
    if variant.sigmas and width * height < variant.distilled_area:
        logger.warning(
            "at %dx%d this distilled model turns fine detail into a pixel grid: use about 1024x1024 or more",
            width, height,
        )  # fmt: skip
    if request.images and width == height == variant.noisy_edit_side:
        side, step = variant.noisy_edit_side, variant.size_multiple
        logger.warning(
            "edits of exactly %dx%d are reported to come out noisy with this model; %dx%d and %dx%d are clean",
            side, side, *[side - step] * 2, *[side + step] * 2,
        )  # fmt: skip
