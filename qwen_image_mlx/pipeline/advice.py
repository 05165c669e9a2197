"""Warnings about requests that run, but not as the user may expect; what a model's variant says decides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from ..variants import Variant
from .control import in_window
from .request import Request

logger: logging.Logger = logging.getLogger(__name__)


def advise(requests: Iterable[Request], variant: Variant) -> None:
    """Warns of the doubtful sides of requests, of each once.

    Args:
        requests: what is generated.
        variant: of the model that generates it.
    """
    for sentence in dict.fromkeys(sentence for request in requests for sentence in _advice(request, variant)):
        logger.warning("%s", sentence)


def _advice(request: Request, variant: Variant) -> Iterator[str]:
    """A sentence for each doubtful side of a request."""
    parameters, steps = request.parameters, request.steps
    width, height = parameters.width, parameters.height
    if not request.prompt.strip():
        yield "the prompt is empty: the model generates whatever it likes"
    if len(request.images) > 2 and not variant.keeps_references:
        yield (
            f"{len(request.images)} reference images are given, each as costly in every step as a target of its size; "
            "fewer reference pixels make them cheaper"
        )
    for control in request.controls:
        if control.scale == 0:
            yield f"the control by {control.reference} has no effect: its scale is 0"
        elif not any(in_window(control.start, control.end, step, steps) for step in range(steps)):
            yield (
                f"the control by {control.reference} has no effect: none of {steps} step{'s' * (steps > 1)} lies "
                f"between {control.start:g} and {control.end:g}"
            )
    if parameters.no_prefix_cache and not variant.keeps_references:
        yield "no_prefix_cache has no effect: this model keeps nothing of the prompt between steps"
    if variant.sigmas and width * height < variant.distilled_area:
        yield (
            f"at {width}x{height} this distilled model turns fine detail into a pixel grid: use about 1024x1024 or more"
        )
    if request.images and width == height == variant.noisy_edit_side:
        side, step = variant.noisy_edit_side, variant.size_multiple
        clean = " and ".join(f"{near}x{near}" for near in (side - step, side + step))
        yield f"edits of exactly {side}x{side} are reported to come out noisy with this model; {clean} are clean"
