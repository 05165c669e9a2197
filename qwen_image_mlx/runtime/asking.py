"""From what is asked for to an opened checkpoint, a request and a plan: the way in that all front ends share.

What is asked for is a mapping by the names of the command line's flags; what is missing is as the model wants it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import RequestError
from ..pipeline.limits import free_memory, limits
from ..pipeline.parameters import DTYPES
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.request import Request, build_request
from ..variants import ASPECT_SIZES, recommended_negative_prompt
from ..weights.lora_inspect import LIGHTNING
from ..weights.quantize import NONE, Quantization
from .memory import (
    Memory,
    MemoryPlan,
    Work,
    alternatives,
    fitting_plan,
    parse_memory,
    table_of,
    work_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.geometry import Size
    from ..pipeline.progress import ProgressCallback

logger = logging.getLogger(__name__)


def open_pipeline(given: Mapping[str, Any], default_model: str, progress: ProgressCallback) -> QwenImagePipeline:
    """The checkpoint that is asked for; raises RequestError, CheckpointError and HubError as `from_pretrained` does."""
    zero_cond_t, group_size = given.get("zero_cond_t"), given.get("group_size")
    if group_size is not None and given.get("quantize") is None:
        raise RequestError("a group size is given, but no quantization", cause="group size")
    quantization = Quantization.parse(given.get("quantize") or NONE, group_size)
    model, loras = given.get("model") or default_model, list(given.get("loras") or ())
    if given.get("lightning"):
        if model not in LIGHTNING:
            raise RequestError(f"no official Lightning LoRA of {model} is known", cause="lightning")
        loras.append(LIGHTNING[model][given["lightning"]])
    return QwenImagePipeline.from_pretrained(
        model,
        revision=given.get("revision"),
        dtype=given.get("dtype") or DTYPES[0],
        zero_cond_t=None if zero_cond_t is None else zero_cond_t == "on",
        quantize=quantization,
        loras=loras,
        lora_mode=given.get("lora_mode") or "auto",
        transformer=given.get("transformer"),
        text_encoder=given.get("text_encoder"),
        vae=given.get("vae"),
        progress=progress,
    )


@contextmanager
def settled(
    pipeline: QwenImagePipeline,
    request: Request,
    memory: str | Memory | None = None,
    *,
    force: bool = False,
    wire: bool = False,
    plans: MutableMapping[Work, MemoryPlan] | None = None,
) -> Iterator[MemoryPlan]:
    """The plan for a request, which the pipeline and MLX keep to meanwhile.

    Args:
        pipeline: the opened checkpoint.
        request: what is to be painted.
        memory: as in `parse_memory`, or what it gave.
        force: go on with what takes least where nothing fits.
        wire: keep macOS from paging out what is in use, see `limits`.
        plans: made before for this pipeline and memory; what is made is put there.

    Raises:
        RequestError: nothing fits the memory, or a caption would be written with a streamed text encoder.
    """
    asked = memory if isinstance(memory, Memory) else parse_memory(memory)
    components, work = pipeline.components, work_of(request, pipeline)
    plans = {} if plans is None else plans
    plan = plans[work] = plans.get(work) or fitting_plan(components, work, asked)
    if plan.peak > asked.budget:
        others = alternatives(components, work, asked.budget)
        logger.warning("too large for the memory:\n%s", table_of(others, asked.budget))
        if not force:
            packs = any(other.needs_pack and other.peak <= asked.budget for other in others)
            raise RequestError(
                f"this takes {plan.peak / 1e9:.2f} GB, but only {asked.budget / 1e9:.2f} may be used",
                cause="streamed quantization" if packs else "budget" if memory else "residency",
            )
    elif plan.peak - mx.get_active_memory() > (free := free_memory()):
        logger.warning(
            "this takes %.1f GB, and only %.1f are free now: the machine will swap; close other programs",
            plan.peak / 1e9, free / 1e9,
        )  # fmt: skip
    if pipeline.writes_caption(request) and "text_encoder" in plan.residency.streamed and not force:
        raise RequestError(
            "streamed, the text encoder would be read from its files again for every word of a caption", cause="caption"
        )
    components.streamed, pipeline.strip_pixels = plan.residency.streamed, plan.strip_pixels
    if memory:
        logger.info("%s: %.1f GB at most, of %.1f", plan.residency.name, plan.peak / 1e9, asked.budget / 1e9)
    with limits(asked.budget, plan.working, wire=wire):
        yield plan


def say_what_is_ignored(asked: Iterable[tuple[Mapping[str, Any], Request]]) -> None:
    """Warns, once, of a negative prompt that was asked for where guidance is off."""
    for wanted, request in asked:
        if (wanted.get("negative_prompt") or "").strip() and request.guiding_prompt is None:
            logger.warning(
                "the negative prompt has no effect: guidance is %g, and only above 1 is a negative prompt used",
                request.parameters.cfg_scale,
            )
            return


def painting_request(
    pipeline: QwenImagePipeline,
    wanted: Mapping[str, Any],
    size: Size | str | None,
    pictures: Sequence[Image],
    mask: Image | None = None,
    straight: Sequence[Image] | None = None,
) -> Request:
    """The request that an opened checkpoint is to paint.

    Args:
        pipeline: the checkpoint, whose recommendations fill what is not asked for.
        wanted: what is asked for.
        size: (width, height), an aspect, or with pictures one of `NAMED_SIZES` or None.
        pictures: to paint over or to edit, upright, RGB.
        mask: white where the first is painted anew.
        straight: the same pictures with their transparency, RGBA, if the result is to have it.

    Raises:
        RequestError: something is out of range or does not fit the model.
    """
    size, canvas = pipeline.variant.size_of(size) if size in ASPECT_SIZES else size, None
    if pictures:
        canvas = pipeline.plan_canvas(
            pictures, mask=mask, size=size, composite=not wanted.get("no_composite"),
            crop_padding=wanted.get("mask_padding"), straight=straight,
        )  # fmt: skip
    sampling = pipeline.recommended
    recommended = {
        "steps": sampling.num_inference_steps,
        "cfg_scale": sampling.cfg_scale,
        "shift": sampling.shift,
        "negative_prompt": recommended_negative_prompt(pipeline.variant, pipeline.model),
    }
    return replace(
        build_request({**recommended, **wanted}, canvas.size if canvas else size),
        images=tuple(pictures) if pipeline.variant.takes_images else (),
        canvas=canvas,
        reference_pixels=wanted.get("reference_pixels"),
    )
