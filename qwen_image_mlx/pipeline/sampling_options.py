"""The options of sampling that Python calls take by keyword, and the parameters that they and a model's own way make.

Importable without MLX.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from ..names import PresetName, SolverName
from ..options import Choice, options_of
from .parameters import GenerationParameters
from .presets import PRESETS, Preset, preset_of

if TYPE_CHECKING:
    from .components import Components
    from .request import Request

logger: logging.Logger = logging.getLogger(__name__)

_FIELDS = {row.name: row.field for row in options_of(GenerationParameters)}


class SamplingOptions(TypedDict, total=False):
    """What `generate`, `edit` and `decompose` take by keyword in addition to their own arguments; None is the default.

    A test keeps it equal to the table of options, from which the command line, config and server are made.

    Attributes:
        solver: how velocities become steps: "euler", "heun", "unipc", "dpmpp-2m", "res-2m" or "lcm".
        guidance_interval: the part of the steps, from 0 to 1, that are guided: (0.1, 0.9), or "0.1:0.9".
        cfg_zero_star: CFG-Zero*: the negative velocity is scaled to fit, and the first step does not move.
        apg: eta of adaptive projected guidance, from 0.
        step_cache: "METHOD" or "METHOD:THRESHOLD", such as "first-block:0.1"; "off" against a preset.
        preset: "draft", "balanced" or "best": steps, solver and step cache together; other arguments override it.
    """

    solver: SolverName | None
    guidance_interval: tuple[float, float] | str | None
    cfg_zero_star: bool | None
    apg: float | None
    step_cache: str | None
    preset: PresetName | None


def preset_for(components: Components, name: PresetName, steps: int | None = None) -> Preset:
    """What a preset means for an opened model, or for some steps of it; raises RequestError for an unknown name."""
    from .calibrated import facts_of  # here: most runs have no preset
    from .opening import is_distilled, recommended_of

    Choice(PRESETS).check("preset", name)
    return preset_of(
        name, steps or recommended_of(components).num_inference_steps, distilled=is_distilled(components),
        measured=facts_of(components).tea is not None,
    )  # fmt: skip


def recommended_sampling(
    components: Components, steps: int | None, name: PresetName | None
) -> tuple[dict[str, Any], Preset | None]:
    """The fields of `GenerationParameters` that a model recommends for some steps, those of a preset over them, and
    what the preset means; None for steps is the model's own number."""
    from .opening import recommended_of

    preset = None if name is None else preset_for(components, name, steps)
    values = {} if preset is None else {_FIELDS[option]: value for option, value in preset.values.items()}
    return recommended_of(components, steps)._asdict() | values, preset


def sampling_of(
    components: Components, options: SamplingOptions, *, num_inference_steps: int | None, cfg_scale: float | None
) -> dict[str, Any]:
    """The fields of `GenerationParameters` of a Python call: its arguments over its preset over the model's own way.

    Raises:
        RequestError: the preset is unknown.
    """
    sampling, preset = recommended_sampling(components, num_inference_steps, options.get("preset"))
    interval = options.get("guidance_interval")
    if isinstance(interval, tuple | list):
        interval = ":".join(map(str, interval))
    given: Mapping[str, Any] = {
        **options, "guidance_interval": interval, "num_inference_steps": num_inference_steps, "cfg_scale": cfg_scale,
    }  # fmt: skip
    sampling |= {name: value for name, value in given.items() if value is not None and name != "preset"}
    if preset is not None:
        logger.info("%s", preset.sentence(sampling))
    return sampling


def with_preset(request: Request, options: SamplingOptions) -> Request:
    """A request with the preset of a Python call, for its record."""
    return replace(request, preset=options.get("preset"))


def check_sampling(components: Components, request: Request) -> None:
    """Raises RequestError if a variant of guidance has no effect without a negative prompt, or if the model lacks facts
    that the step cache needs."""
    parameters = request.parameters
    parameters.check_guidance(request.steps, negative=request.negative_prompt is not None)
    if parameters.step_cache:
        from .step_cache import cache_of  # here: most runs have no step cache

        cache_of(components, parameters.step_cache, request.steps)
