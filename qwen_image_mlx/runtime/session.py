"""A session opens a model, plans memory and runs requests. Every front end generates through here.

Options are a mapping keyed by their names in the table (`options.py`); absent ones take the model's defaults. The
caller prints and writes files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import RequestError
from ..names import Aspect, NamedSize, Parallel, PresetName, Task
from ..options import options_of
from ..pipeline.conductor import GeneratedImage, decompose, encode, generate, keeping
from ..pipeline.control import controls_of
from ..pipeline.image_request import canvas_of, control_prompt, start_options, transparent_prompt
from ..pipeline.limits import free_memory, limits
from ..pipeline.opening import distillation, is_distilled
from ..pipeline.parameters import GenerationParameters
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.presets import Preset
from ..pipeline.request import Request, build_request
from ..pipeline.sampling_options import check_sampling, preset_for, recommended_sampling
from ..registry import TEXT_ENCODER
from ..variants import ASPECT_SIZES, LAYERED_RESOLUTIONS, recommended_negative_prompt
from ..weights.schemes import NONE, Quantization
from .memory import Memory, alternatives, fitting_plan, parse_memory
from .memory_plan import MemoryPlan, Planner, Work, table_of, work_of
from .options import OPTIONS, OpenOptions, of_task
from .ranks import current
from .residency import DEFAULT

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.geometry import Size
    from ..pipeline.conditioning import Encodings
    from ..pipeline.decomposition import LayeredResult
    from ..pipeline.progress import ProgressCallback
    from .cache import EncodingCache
    from .preview import Show

logger: logging.Logger = logging.getLogger(__name__)


class Session:
    """One opened model, and the policy it works by.

    Args:
        pipeline: the opened checkpoint.
        options: memory, force, wire and cache; memory may be a result of `parse_memory`.
        progress: called for every stage and step; can cancel.

    Attributes:
        memory: the memory that may be used.
        force: whether to run the plan with the lowest peak if none fits.
        plans: the plans made so far, keyed by their work.
        task: what images are for where a request does not say: to be edited, or to be started from.
    """

    def __init__(
        self, pipeline: QwenImagePipeline, options: Mapping[str, Any] = {}, progress: ProgressCallback | None = None
    ):
        memory = options.get("memory")
        self.pipeline = pipeline
        self.task: Task = pipeline.variant.task
        self.progress = progress
        self.plans: dict[Work, MemoryPlan] = {}
        self._memory_given = memory is not None
        self.memory: Memory = memory if isinstance(memory, Memory) else parse_memory(memory)
        self.force: bool = bool(options.get("force"))
        self.parallel: Parallel = options.get("parallel", "auto")
        self._wire = bool(options.get("wire"))
        self._cache = _cache() if options.get("cache") else None
        self._warned = False
        self._last_preset: Preset | None = None

    @classmethod
    def open(
        cls,
        options: Mapping[str, Any],
        default_model: str,
        progress: ProgressCallback | None = None,
        *,
        task: Task | None = None,
    ) -> Session:
        """Opens a model.

        Args:
            options: options, keyed by name.
            default_model: the model if the options name none.
            progress: called for every stage and step; can cancel.
            task: the task that the model must be made for: "generate", "edit" or "decompose"; None allows any.

        Raises:
            RequestError: an option is out of range, or the model is not made for the task.
            CheckpointError: the files are not those of a pipeline this package runs.
            HubError: the model cannot be fetched.
        """
        logger.debug("options: %s", ", ".join(f"{name} {options[name]!r:.200}" for name in OPTIONS if name in options))
        session = cls(open_pipeline(OpenOptions.from_options(options, default_model), progress), options, progress)
        if task is not None:
            session.pipeline.check_task(task)
            session.task = task
        return session

    @property
    def shows_alpha(self) -> bool:
        """Whether the model sees the transparency of images, so that they are opened as RGBA."""
        return self.pipeline.latent_space.pixel_channels == 4

    # Requests -------------------------------------------------------------------------------------------------------

    def request(
        self,
        options: Mapping[str, Any],
        size: Size | Aspect | NamedSize | None = None,
        images: Sequence[Image] = (),
        mask: Image | None = None,
        straight: Sequence[Image] | None = None,
        *,
        task: Task | None = None,
    ) -> Request:
        """Makes a request for the model; warns, once, of a negative prompt that has no effect.

        Args:
            options: options, keyed by name; the model's recommendations fill the missing ones.
            size: (width, height), an aspect, or with images one of `NAMED_SIZES` or None; for a layered model the
                size is in `options`.
            images: the images to start from or to edit, upright, RGB; for a layered model one to decompose, RGBA.
            mask: white where the first image is inpainted.
            straight: the same images as RGBA, if the result keeps their transparency.
            task: whether images are edited or started from; None is what the session was opened for, or the model's.

        Raises:
            RequestError: something is out of range or does not fit the model.
        """
        variant, components = self.pipeline.variant, self.pipeline.components
        sampling, preset = recommended_sampling(components, options.get("steps"), options.get("preset"))
        task = task or self.task
        if variant.layered:
            request = layers_of(images[0], options, variant.resolutions, sampling)
        else:
            canvas = None
            # Here it has no aspect, and without images it is a pair; a type checker cannot know that.
            named = cast("Size | NamedSize | None", variant.size_of(size) if size in ASPECT_SIZES else size)
            if images:
                canvas = canvas_of(
                    variant, images, mask=mask, size=named, composite=not options.get("no_composite"),
                    crop_padding=options.get("mask_padding"), straight=straight, outpaint=options.get("outpaint"),
                )  # fmt: skip
            recommended: dict[str, Any] = {
                r.name: sampling[r.field] for r in options_of(GenerationParameters) if r.field in sampling
            }
            recommended["negative_prompt"] = recommended_negative_prompt(variant, self.pipeline.model)
            values = {**recommended, **start_options(options.get("strength"), options.get("outpaint")), **options}
            if options.get("transparent"):
                values["prompt"] = transparent_prompt(variant, values["prompt"])
            values["prompt"] = control_prompt(variant, values["prompt"], controls_of(values.get("controls")))
            request = replace(
                build_request(values, canvas.size if canvas else cast("Size", named)),
                images=tuple(images) if task == "edit" else (),
                canvas=canvas,
                reference_pixels=options.get("reference_pixels"),
            )
        if preset is not None:
            request = replace(request, preset=preset.name)
            if preset != self._last_preset:
                self._last_preset = preset
                logger.info("%s", preset.sentence(vars(request.parameters)))
        check_sampling(components, request)
        if (options.get("negative_prompt") or "").strip() and request.guiding_prompt is None and not self._warned:
            self._warned = True
            logger.warning(
                "the negative prompt has no effect: guidance is %g, and only above 1 is a negative prompt used",
                request.parameters.cfg_scale,
            )
        return request

    @property
    def is_distilled(self) -> bool:
        """Whether the model, or a LoRA on it, was trained for a few steps of its own."""
        return is_distilled(self.pipeline.components)

    def preset(self, name: PresetName, steps: int | None = None) -> Preset:
        """What a preset means for the model, or for some steps of it."""
        return preset_for(self.pipeline.components, name, steps)

    # Plan -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def plan(self, request: Request, parallel: Parallel | None = None) -> Iterator[MemoryPlan]:
        """The plan for a request; inside the block the pipeline and MLX keep to it.

        Args:
            request: the request.
            parallel: how several ranks share it; None is as the session was opened.

        Raises:
            RequestError: nothing fits the memory, or a caption would be written with a streamed text encoder. With
                `force` there is a warning instead, and the plan with the lowest peak is used.
        """
        pipeline, budget = self.pipeline, self.memory.budget
        work = work_of(request, pipeline)
        self._share(request, work, parallel or self.parallel)
        plan = self._plan(work)
        if plan.peak > budget and self.works:
            others = self.alternatives(work)
            logger.warning("too large for the memory:\n%s", table_of(others, budget))
            if not self.force:
                packs = any(other.needs_pack and other.peak <= budget for other in others)
                without = fitting_plan(pipeline.components, replace(work, keeps_prefix=False), self.memory)
                raise RequestError(
                    f"this takes {plan.peak / 1e9:.2f} GB, but only {budget / 1e9:.2f} may be used",
                    cause="streamed quantization" if packs
                    else "prefix cache" if without.peak <= budget
                    else "budget" if self._memory_given
                    else "residency",
                )  # fmt: skip
        elif plan.peak - mx.get_active_memory() > (free := free_memory()):
            logger.warning(
                "this takes %.1f GB, and only %.1f are free now: the machine will swap; close other programs",
                plan.peak / 1e9, free / 1e9,
            )  # fmt: skip
        streamed = plan.residency.streamed
        if request.writes_caption(pipeline.variant) and TEXT_ENCODER in streamed and not self.force:
            raise RequestError(
                "streamed, the text encoder would be read from its files again for every word of a caption",
                cause="caption",
            )
        if self._memory_given:
            logger.info("%s: %.1f GB at most, of %.1f", plan.residency.name, plan.peak / 1e9, budget / 1e9)
        with limits(budget, plan.working, wire=self._wire), keeping(pipeline, streamed, plan.strip_pixels):
            yield plan

    def _plan(self, work: Work) -> MemoryPlan:
        """The plan for a piece of work; those of a whole transformer are kept."""
        if self.pipeline.components.relay is not None:
            return fitting_plan(self.pipeline.components, work, self.memory)
        if work not in self.plans:
            self.plans[work] = fitting_plan(self.pipeline.components, work, self.memory)
        return self.plans[work]

    def _share(self, request: Request, work: Work, parallel: Parallel) -> None:
        """If there are several ranks, lets them agree on a request and on how they share it."""
        if current().size == 1:
            return
        from .shared import SharedPipeline, begin  # here: most runs are one process

        assert isinstance(self.pipeline, SharedPipeline)
        with self.pipeline.components.unconnected():
            whole = self._plan(work)
        begin(self.pipeline, request, work, whole, self.memory, parallel)

    def shared_table(self, work: Work) -> str:
        """For people: what a piece of work takes on each rank; every rank calls this."""
        from .traffic import table_of_ranks  # here: most runs are one process

        ranks = current()
        return table_of_ranks(self.pipeline.components, work, ranks.link, ranks.size)

    @property
    def works(self) -> bool:
        """Whether this process has a part in the work that was planned last; among several ranks some may have none."""
        return getattr(self.pipeline, "works", True)

    @property
    def leads(self) -> bool:
        """Whether this process gets the results; among several ranks the first does."""
        return current().leads

    def own_images(self, count: int) -> int:
        """How many of the images that were planned last are denoised by this process."""
        return getattr(self.pipeline, "own_images", int)(count)

    def attend(self) -> None:
        """Takes part in the exchanges of planned work in which this process has no other part."""
        getattr(self.pipeline, "attend", lambda: None)()

    def alternatives(self, work: Work) -> list[MemoryPlan]:
        """For each residency, the plan of a piece of work that fits the session's memory, or has the lowest peak."""
        return alternatives(self.pipeline.components, work, self.memory.budget)

    def pass_flop(self, work: Work) -> float:
        """Floating point operations of one pass through the transformer after the first."""
        return Planner(self.pipeline.components, work, DEFAULT).pass_flop()

    # Run ------------------------------------------------------------------------------------------------------------

    def generate(self, request: Request, show: Show | None = None) -> Iterator[GeneratedImage]:
        """Plans, then yields the request's images one by one.

        Args:
            request: what to generate.
            show: called with a preview after each step.

        Raises:
            RequestError: as `plan`.
        """
        with self.plan(request) as plan:
            yield from self.planned_images(request, plan, self.watch(request, show), self._cache)

    def planned_images(
        self, request: Request, plan: MemoryPlan, progress: ProgressCallback | None, cache: Encodings | None
    ) -> Iterator[GeneratedImage]:
        """Yields the images of a request inside its plan; on ranks other than the first, none."""
        if self.works:
            yield from generate(self.pipeline, request, progress, self._encodings(cache), **plan.residency.releases)
        else:
            self.attend()

    def decompose(self, request: Request, show: Show | None = None) -> LayeredResult | None:
        """Plans, then decomposes an image; the cache stores the caption too.

        Returns:
            The layers; None on all ranks but the first.

        Raises:
            RequestError: nothing fits the memory.
        """
        with self.plan(request) as plan:
            return self.planned_layers(request, plan, self.watch(request, show), self._cache)

    def planned_layers(
        self, request: Request, plan: MemoryPlan, progress: ProgressCallback | None, cache: Encodings | None
    ) -> LayeredResult | None:
        """The layers of an image inside the request's plan; None on all ranks but the first."""
        if self.leads:
            return decompose(self.pipeline, request, progress, self._encodings(cache), **plan.residency.releases)
        for _ in self.planned_images(request, plan, progress, cache):
            raise AssertionError("only rank 0 decodes")
        return None

    def encode(self, request: Request) -> Any:
        """A request's encoding, from the session's cache if possible."""
        return encode(self.pipeline, request, self.progress, self._encodings(self._cache))

    def _encodings(self, stored: Encodings | None) -> Encodings | None:
        """What looks encodings up for planned work: this process's store, or all ranks' together."""
        found: Encodings | None = getattr(self.pipeline, "encodings", lambda stored: stored)(stored)
        return found

    def watch(self, request: Request, show: Show | None) -> ProgressCallback | None:
        """The progress callback for a request: the session's own, wrapped in a `Preview` if `show` is given."""
        if show is None or not self.leads:
            return self.progress
        if not self.pipeline.variant.preview:
            logger.warning("no preview is shown: how the latents of %s look is not known", self.pipeline.model)
            return self.progress
        from .preview import Preview  # here: most runs show none

        return Preview(show, self.progress, self.pipeline, request)


def _cache() -> EncodingCache:
    from .cache import EncodingCache  # here: most runs keep no encodings

    return EncodingCache()


def open_pipeline(options: OpenOptions, progress: ProgressCallback | None = None) -> QwenImagePipeline:
    """Opens a checkpoint by its options; raises RequestError, CheckpointError and HubError like `from_pretrained`."""
    if options.group_size is not None and options.quantize is None:
        raise RequestError("a group size is given, but no quantization", cause="group size")
    loras = list(options.loras)
    if options.lightning:
        from ..lora.distillations import LIGHTNING  # here: most runs have no LoRA

        if options.model not in LIGHTNING:
            raise RequestError(f"no official Lightning LoRA of {options.model} is known", cause="lightning")
        loras.append(LIGHTNING[options.model][options.lightning])
    kind = QwenImagePipeline
    if current().size > 1:
        from .shared import SharedPipeline as kind  # here: most runs are one process
    pipeline = kind.from_pretrained(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        zero_cond_t=None if options.zero_cond_t is None else options.zero_cond_t == "on",
        quantize=Quantization.parse(options.quantize or NONE, options.group_size),
        loras=loras,
        lora_mode=options.lora_mode,
        transformer=options.transformer,
        text_encoder=options.text_encoder,
        vae=options.vae,
        progress=progress,
    )
    found = distillation(pipeline.components)
    if found is not None and pipeline.components.adapters is None:  # a LoRA says so itself
        logger.info(
            "a distilled model (by %s): %d steps, guidance %g and %s unless told otherwise",
            found.evidence, found.steps, found.cfg_scale, found.schedule,
        )  # fmt: skip
    return pipeline


def layers_of(
    image: Image, options: Mapping[str, Any], resolutions: Sequence[int], sampling: Mapping[str, Any] = {}
) -> Request:
    """Makes a layered model's request from options.

    Args:
        image: RGBA.
        options: options, keyed by name; absent ones take the defaults of `layers_request`.
        resolutions: the model's resolutions, the default first.
        sampling: the model's recommended `GenerationParameters`, keyed by field.

    Raises:
        RequestError: something is out of range.
    """
    from ..pipeline.decomposition import layers_request  # here: most runs make no layers

    rows = [row for row in of_task("decompose") if options.get(row.name) is not None]
    fields = {row.field: options[row.name] for row in rows if row.field}
    others = {
        row.name: options[row.name]
        for row in rows
        if not row.field and row.name not in ("image", "prompt", "seed", "preset")  # `sampling` has the preset's values
    }
    seed = options["seed"]
    return layers_request(
        image, options.get("prompt", ""), seed=seed[0] if isinstance(seed, list) else seed, resolutions=resolutions,
        sampling={**sampling, **fields}, **others,
    )  # fmt: skip


def layers_draft(image: Image, options: Mapping[str, Any], resolutions: Sequence[int] | None = None) -> Request:
    """A layered model's request as far as it is known without the model.

    Args:
        image, options: as in `layers_of`.
        resolutions: the model's, if they are known; without them it judges an unusual one itself, when it is opened.

    Raises:
        RequestError: as `layers_of`.
    """
    if not resolutions and options.get("resolution") not in LAYERED_RESOLUTIONS:
        options = {**options, "resolution": None}
    return layers_of(image, options, resolutions or LAYERED_RESOLUTIONS)
