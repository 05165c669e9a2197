"""Flags without effect: warns of each, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.ranks import current
from .flags import rows_of

if TYPE_CHECKING:
    from ..pipeline.request import Request

logger: logging.Logger = logging.getLogger(__name__)


def _without_metal(given: Mapping[str, Any], request: Request) -> bool:
    import mlx.core as mx

    return not mx.metal.is_available()


# Keyed by option: when it has no effect, and why.
_IDLE: dict[str, tuple[Callable[[Mapping[str, Any], Request], bool], str]] = {
    "lora_mode": (lambda given, request: not {"loras", "lightning"} & given.keys(), "no LoRA is given"),
    "caption_language": (
        lambda given, request: bool(request.prompt.strip()) or request.layer_mask is not None,
        "a prompt or a layer's mask is given, so no caption is written",
    ),
    "cfg_normalize": (lambda given, request: request.guiding_prompt is None, "guidance is off"),
    "ignore_profile": (lambda given, request: request.canvas is None, "no image is read"),
    "keep_alpha": (
        lambda given, request: request.canvas is not None and request.canvas.straight is None,
        "the image has no transparency",
    ),
    "parallel": (lambda given, request: current().size == 1, "this is one process; mlx.launch starts several"),
    "num_layers": (
        lambda given, request: bool({"layer_prompt", "layer_mask"} & given.keys()),
        "one layer is made, by its name or mask",
    ),
    "wire": (_without_metal, "this machine has no Metal"),
}


def warn_idle(command: str, given: Mapping[str, Any], request: Request) -> None:
    """Warns of flags that have no effect on a request.

    Args:
        command: the command that was typed; only its own flags are judged.
        given: the options on the command line, keyed by name.
        request: what is generated.
    """
    for row in rows_of(command):
        is_idle, why = _IDLE.get(row.name, (None, ""))
        if is_idle is not None and row.name in given and is_idle(given, request):
            logger.warning("%s has no effect: %s", row.flag, why)
