"""From an encoding to latents, and from latents to pixels: the work of the two core calls, as functions.

They have no policy: they release nothing and print nothing. What they return is evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import QwenImageError, RequestError
from ..gpu import all_finite
from ..registry import IN_CONTEXT, TRANSFORMER, VAE, VAE_DECODER
from ..sampling.choices import parse_interval
from ..sampling.denoise import denoise
from ..sampling.guidance import Guidance
from ..sampling.schedule import Schedule, exponential_mu, make_schedule, root_mu, static_shift, uniform_sigmas
from ..sampling.solvers import SOLVERS
from .autoencode import decode, strips_of
from .components import Components
from .conditioning import GuidanceEncoding, InitialImage, Reference
from .parameters import GenerationParameters, check_fits
from .progress import Passes, Progress, ProgressCallback
from .reporter import Reporter
from .seams import Conditions, ControlInput, Denoiser, DenoiserClass
from .start import Start, draw_start
from .working import working

if TYPE_CHECKING:
    from .step_cache import CachedDenoiser

logger: logging.Logger = logging.getLogger(__name__)


def frames_of(components: Components, parameters: GenerationParameters) -> int:
    """Number of images generated together: 1, or the whole image and its layers with a layered model."""
    return parameters.num_layers + 1 if components.variant.layered and not parameters.single_layer else 1


def denoise_latents(
    components: Components,
    make_denoiser: DenoiserClass,
    report: Reporter,
    parameters: GenerationParameters,
    encoding: GuidanceEncoding,
    *,
    seed: int,
    image_index: int,
    latents: mx.array | np.ndarray | None,
    initial: InitialImage | None,
    controls: Sequence[ControlInput] = (),
    progress: ProgressCallback | None,
) -> mx.array:
    """The work of `QwenImagePipeline.denoise_latents`; its arguments and errors, and:

    Args:
        components: the checkpoint's parts.
        make_denoiser: makes the `Denoiser` of the image.
        report: receives progress.
    """
    variant, space, solver = components.variant, components.latent_space, SOLVERS[parameters.solver]
    check_fits(parameters, variant)
    _check_encoding(components, encoding, initial, parameters.single_layer)
    rows, columns = space.grid(parameters.width, parameters.height)
    schedule = schedule_of(components, parameters, rows * columns, encoding.references)
    start = _start(components, parameters, schedule, seed, image_index, latents, initial)
    references = encoding.references
    if start.blended and variant.samples_references:
        assert start.image is not None
        references = (Reference(start.image, rows, columns),)
    references += tuple(Reference(c.tokens, rows, columns) for c in controls if c.role == IN_CONTEXT)
    negative = encoding.negative if parameters.cfg_scale > 1 else None
    if parameters.cfg_scale > 1 and negative is None:
        logger.warning("guidance %g has no effect: the encoding has no negative prompt", parameters.cfg_scale)
    conditions = Conditions(
        branches=(encoding.positive,) if negative is None else (encoding.positive, negative),
        references=references,
        frames=frames_of(components, parameters),
        rows=rows,
        columns=columns,
        sigmas=solver.evaluations(start.schedule),
        controls=tuple(control for control in controls if control.role != IN_CONTEXT),
        keeps_prefix=not parameters.no_prefix_cache,
    )
    make_denoiser.check(components, conditions)

    guidance = None if negative is None else _guidance(components, parameters)
    steps, sigmas = start.schedule.num_steps, start.schedule.sigmas
    cache: CachedDenoiser | None = None
    if parameters.step_cache:
        from .step_cache import cache_of  # here: most runs have no step cache

        cache_of(components, parameters.step_cache, steps)  # its faults, before anything is loaded
    run = 0
    with working(components, report, progress):
        denoiser: Denoiser = make_denoiser(components, conditions, report)
        if parameters.step_cache:
            from .step_cache import with_cache

            denoiser = cache = with_cache(
                denoiser, components, parameters.step_cache, evaluations=conditions.sigmas, steps=steps,
                all_steps=schedule.num_steps,
            )  # fmt: skip
        report(Progress("denoise", 0, steps, sigma=float(sigmas[0]), latents=start.latents))
        with components.passing(TRANSFORMER) as pace:

            def velocities(latents: mx.array, evaluation: int, branches: int) -> Sequence[mx.array]:
                nonlocal run
                run += branches
                pace.begin()
                return denoiser.velocities(latents, evaluation, pace, branches)

            result = denoise(
                velocities,
                start.latents,
                start.schedule,
                guidance,
                lambda n, step: report(
                    Progress(
                        "denoise",
                        n,
                        steps,
                        sigma=float(sigmas[n]),
                        latents=step.latents,
                        denoised=step.denoised,
                        skipped=cache.skipped if cache else 0,
                    )
                ),
                start.blend if start.blended else None,
                solver,
                start.draw,
            )
    skipped = cache.skipped if cache else 0
    components.passes = Passes(run - skipped, skipped)
    if not all_finite(result):
        raise QwenImageError("the generated latents are not finite: try the dtype bfloat16, or check the weights")
    return result


def decode_frames(
    components: Components,
    report: Reporter,
    parameters: GenerationParameters,
    latents: mx.array,
    strip_pixels: int,
    progress: ProgressCallback | None,
) -> Iterator[mx.array]:
    """The work of `QwenImagePipeline.decode_frames`, at most `strip_pixels` pixels at once."""
    frames = frames_of(components, parameters)
    unpacked = components.latent_space.unpack_frames(latents, frames, parameters.width, parameters.height)[0]
    first = 1 if frames > 1 else 0
    strips = strips_of(parameters.width * parameters.height, strip_pixels)
    for n in range(first, frames):
        with working(components, report, progress):
            decoder = components.network(VAE_DECODER)
            with report.stage("decode", f"layer {n}" if first else ""):
                pixels = decode(decoder, components.config(VAE), unpacked[n : n + 1], strips)[0]
        if not all_finite(pixels):
            raise QwenImageError("the decoded image is not finite: check the autoencoder's weights")
        yield pixels


def schedule_of(
    components: Components, parameters: GenerationParameters, frame_tokens: int, references: Sequence[Reference]
) -> Schedule:
    """The schedule of an image with a number of tokens per frame."""
    config = components.scheduler_config
    if parameters.shift is not None:
        config = static_shift(config, parameters.shift)
    if not parameters.stretch:
        config = replace(config, shift_terminal=0.0)
    sigmas = parameters.sigmas or components.variant.sigmas or uniform_sigmas(parameters.num_inference_steps)
    if components.variant.shift_by_root:
        mu = root_mu(references[0].height * references[0].width)
    else:
        mu = exponential_mu(config, frame_tokens)
    return make_schedule(config, sigmas, mu)


def _guidance(components: Components, parameters: GenerationParameters) -> Guidance:
    """How the two velocities of a step are combined."""
    renormalize = components.variant.renormalize if parameters.cfg_normalize is None else parameters.cfg_normalize
    interval = parse_interval(parameters.guidance_interval) if parameters.guidance_interval else (0.0, 1.0)
    return Guidance(parameters.cfg_scale, renormalize, interval, parameters.cfg_zero_star, parameters.apg)


def _check_encoding(
    components: Components, encoding: GuidanceEncoding, initial: InitialImage | None, single_layer: bool
) -> None:
    """Raises RequestError for an encoding of a different kind of model."""
    variant, model = components.variant, components.snapshot.model
    if not variant.takes_images if encoding.references else variant.needs_images:
        kinds = ("works on images", "none") if variant.takes_images else ("generates from text", "images")
        raise RequestError("{} {}; the encoding holds {}".format(model, *kinds))
    most = 1 if variant.layered and not single_layer else variant.max_images  # a layer's mask is a second image
    if most is not None and len(encoding.references) > most:
        raise RequestError(
            f"{model} works on at most {most} image{'s' * (most > 1)}, but the encoding has {len(encoding.references)}"
        )
    if variant.layered and initial is not None:
        raise RequestError(f"{model} decomposes an image; it does not change one")


def _start(
    components: Components,
    parameters: GenerationParameters,
    schedule: Schedule,
    seed: int,
    image_index: int,
    latents: mx.array | np.ndarray | None,
    initial: InitialImage | None,
) -> Start:
    space, size = components.latent_space, (parameters.width, parameters.height)
    frames = frames_of(components, parameters)
    if latents is not None:
        shape = space.shape(frames, *size)
        if tuple(latents.shape) != shape:
            raise RequestError(
                f"latents have the shape {tuple(latents.shape)}, but {size[0]}x{size[1]} pixels need {shape}"
            )
        latents = mx.array(latents)
    if initial is not None:
        height, width = (space.factor * side for side in initial.mean.shape[1:3])
        if (width, height) != size:
            raise RequestError(f"the initial image was encoded at {width}x{height}, not at {size[0]}x{size[1]}")
    return draw_start(
        components.config(VAE), space, schedule, parameters, frames, seed, image_index, latents, initial,
        components.dtype,
    )  # fmt: skip
