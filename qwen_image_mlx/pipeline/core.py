"""The two core calls, `encode_guidance_prompts` and `generate_pixels`.

Neither call releases, caches or prints on a policy of its own; both evaluate what they return, because an unevaluated
encoding would keep the text encoder alive. What to keep in memory between them is the caller's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import GPUError, QwenImageError, RequestError
from ..gpu import all_finite, finish, gpu_faults
from ..images.geometry import Size, size_of_area
from ..images.sources import ImageSource, check_visible, listed, open_image, open_mask, open_rgba
from ..models.qwen_image.rope import MAX_POSITION, Segment, place_images, rotary_tables, text_start
from ..models.qwen_image.transformer import Modulation
from ..names import CaptionLanguage
from ..registry import LANGUAGE_HEAD, TEXT_ENCODER, TRANSFORMER, VAE, VAE_DECODER, VAE_ENCODER, VISION
from ..sampling.denoise import Guidance, denoise
from ..sampling.latents import unpack_multi_layer_latents
from ..sampling.schedule import Schedule, exponential_mu, make_schedule, root_mu, static_shift, uniform_sigmas
from ..text.prompt import tokenize_prompt
from ..variants import CAPTION_TEMPLATES, Variant
from ..weights.modulation import modulation_table
from .autoencode import STRIP_PIXELS, decode, strips_of
from .caption import MAX_TOKENS, write_caption
from .components import Components
from .conditioning import EncodingSource, GuidanceEncoding, InitialImage, Reference
from .encode import encode_initial_image, encode_prompts, encode_references, encode_vision, feature_grid
from .limits import limits
from .loras import profile_of
from .parameters import (
    GenerationParameters,
    check_image_index,
    check_reference_pixels,
    check_seed,
    check_side,
    check_size,
)
from .progress import Progress, ProgressCallback, Reporter
from .start import Start, draw_start

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

logger: logging.Logger = logging.getLogger(__name__)


class Recommended(NamedTuple):
    """How a model wants to be sampled; the fields are those of `GenerationParameters`.

    Attributes:
        num_inference_steps: denoising steps.
        cfg_scale: guidance.
        shift: a static shift of the schedule; None takes the checkpoint's own.
    """

    num_inference_steps: int
    cfg_scale: float
    shift: float | None

    def unless(self, **given: float | None) -> dict[str, Any]:
        """The fields by name; those given, and not None, instead of the recommended ones."""
        return self._asdict() | {name: value for name, value in given.items() if value is not None}


class PipelineCore:
    """What a checkpoint can do, step by step; `QwenImagePipeline` adds opening, convenience and control of memory.

    Args:
        components: the checkpoint's parts.
        report: where progress goes.

    Attributes:
        components: the checkpoint's parts, for what works on them beside the pipeline.
        strip_pixels: most pixels that are decoded at once; changes memory, never a bit of the result.
    """

    def __init__(self, components: Components, report: Reporter):
        self.components = components
        self._report = report
        self.strip_pixels: int = STRIP_PIXELS
        self._table: tuple[Schedule, list[Modulation]] | None = None

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The directory or repository id it was opened from."""
        return self.components.snapshot.model

    @property
    def revision(self) -> str | None:
        """Commit of the checkpoint; None for a local directory."""
        return self.components.snapshot.revision

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the text encoder and the transformer."""
        return self.components.dtype

    @property
    def variant(self) -> Variant:
        """What the checkpoint's pipeline class implies: template, defaults."""
        return self.components.variant

    @property
    def recommended(self) -> Recommended:
        """How it wants to be sampled: as its card says, or as a distilled LoRA was trained."""
        adapters = self.components.adapters
        profile = profile_of(adapters.loras) if adapters else None
        if profile is None:
            return Recommended(self.variant.steps, self.variant.cfg_scale, None)
        return Recommended(profile.steps, profile.cfg_scale, profile.shift)

    @property
    def fingerprint(self) -> str:
        """Tells apart what encodes: the commit, or a directory's files by name, size and time."""
        return self.components.fingerprint

    def prepare(self) -> None:
        """Fetches all that painting needs and checks the files, loading nothing.

        Raises:
            HubError: something could not be downloaded.
            CheckpointError: something is missing, damaged or does not fit.
        """
        self.components.prepare()

    # The two core calls -----------------------------------------------------------------------------------------

    def encode_guidance_prompts(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        reference_pixels: int | None = None,
        sequential_positions: bool = False,
        progress: ProgressCallback | None = None,
    ) -> GuidanceEncoding:
        """Encodes what to paint and, if given, what to avoid, and the pictures to work on.

        Args:
            prompt: what to paint; may be empty (the picture is then the model's own idea), and is cut at the limit of
                the reference with a warning.
            negative_prompt: what to avoid; None paints without guidance, "" and " " are prompts like any other.
            images: the pictures an editing or layered model works on: PIL images, uint8 arrays (H, W, 3 or 4), paths
                or bytes.
            reference_pixels: at most so many pixels of each picture are shown to the transformer; None is the model's
                own area, about 1 MP. Every reference costs as much time per step as a target of its size.
            sequential_positions: number the tokens 0, 1, 2, … in spite of pictures, to compare with libraries that
                lost the three position axes.
            progress: replaces the pipeline's own callback during the call.

        Returns:
            The encoding, evaluated and independent of the encoders.

        Raises:
            RequestError: a picture cannot be read, or the model does not take so many.
            QwenImageError: the encoder's output is not finite, which float16 can cause.
        """
        check_reference_pixels(reference_pixels)
        parts = self.components
        pictures = self._open_images(images)
        shown = pictures if self.variant.encoder_area else []
        with self._working(progress):
            prompts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
            grids = [feature_grid(parts, picture, self.variant.encoder_area) for picture in shown]
            template = self.variant.template
            tokens = [tokenize_prompt(parts.tokenizer, template, text, grids, sequential_positions) for text in prompts]
            self._check_length(max(len(prompt_tokens.ids) - prompt_tokens.first for prompt_tokens in tokens))
            features = None
            if shown:
                parts.load(VISION)
                with self._report.stage("encode", "pictures"):
                    features = encode_vision(parts, shown, self.variant.encoder_area)
            parts.load(TEXT_ENCODER)
            with self._report.stage("encode", "prompts"):
                states = encode_prompts(parts, tokens, features)
            references: tuple[Reference, ...] = ()
            if pictures:
                parts.load(VAE_ENCODER)
                with self._report.stage("encode", "references"):
                    references = encode_references(parts, pictures, reference_pixels)
        return GuidanceEncoding(
            states[0],
            states[1] if negative_prompt is not None else None,
            references,
            EncodingSource(self.model, self.revision, prompt, negative_prompt),
        )

    def encode_initial_image(
        self,
        image: ImageSource,
        size: Size,
        mask: ImageSource | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> InitialImage:
        """Encodes a picture to start painting from (image to image), or to keep where a mask is black (inpainting).

        Args:
            image: the picture; resized to `size` whatever its aspect.
            size: (width, height) of the picture to be painted, multiples of 16.
            mask: grey values; at least a half (white) is painted anew.
            progress: replaces the pipeline's own callback during the call.

        Returns:
            What `generate_pixels` takes as `initial`.
        """
        check_size(*size)
        picture, opened = open_image(image), None if mask is None else open_mask(mask)
        with self._working(progress):
            self.components.load(VAE_ENCODER)
            with self._report.stage("encode", "picture"):
                return encode_initial_image(self.components, picture, size, opened)

    def caption_image(
        self,
        image: ImageSource,
        *,
        language: CaptionLanguage = "en",
        resolution: int = 640,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Describes a picture in words, with the checkpoint's own language model; deterministic for a seed.

        Args:
            image: the picture; shown on white where it is transparent.
            language: "en" or "zh".
            resolution: the picture is shown at about `resolution`² pixels.
            seed: of the draws, where the checkpoint's generation_config.json asks for sampling.
            progress: told of every token, and can cancel.

        Raises:
            RequestError: the picture cannot be read or shows nothing, or the language is another.
            CheckpointError: the checkpoint has no language head or no vision tower.
        """
        check_side(resolution)
        if not isinstance(language, str) or language not in CAPTION_TEMPLATES:
            raise RequestError(f"language is {language!r}, but must be one of {', '.join(CAPTION_TEMPLATES)}")
        parts, picture = self.components, open_rgba(image)
        check_visible(picture)
        with self._working(progress):
            parts.prepare_captions()
            parts.load(VISION, TEXT_ENCODER, LANGUAGE_HEAD)
            return write_caption(
                parts, picture, resolution**2, language, check_seed(seed),
                lambda count: self._report(Progress("caption", count, MAX_TOKENS)),
            )  # fmt: skip

    def output_size(self, images: Sequence[ImageSource]) -> Size:
        """(width, height) that an edit of these pictures has unless another is asked for: about 1 MP."""
        return size_of_area(self.variant.target_area, self._open_images(images)[self.variant.size_from].size)

    def generate_pixels(
        self,
        parameters: GenerationParameters,
        encoding: GuidanceEncoding,
        *,
        seed: int = 0,
        image_index: int = 0,
        latents: mx.array | np.ndarray | None = None,
        initial: InitialImage | None = None,
        progress: ProgressCallback | None = None,
    ) -> mx.array:
        """Paints one picture.

        Args:
            parameters: size, steps, guidance and noise source.
            encoding: from `encode_guidance_prompts`, of this process or another.
            seed: of the initial noise, 0 … 2**64 - 1.
            image_index: which of the pictures that one seed gives, as in the reference's num_images_per_prompt.
            latents: packed initial noise (1, N, 64) instead of the seed's.
            initial: from `encode_initial_image`: a picture of which `parameters.strength` is painted anew.
            progress: replaces the pipeline's own callback during the call; told of every step, and can cancel.

        Returns:
            Pixels (frames, height, width, channels) in [0, 1], fp32, evaluated; one RGB frame, or a layered model's
            RGBA layers, back to front.

        Raises:
            RequestError: encoding, latents or initial image do not fit the model or the size.
            Cancelled: the callback asked to stop.
            QwenImageError: the result is not finite.
        """
        with self._report.using(progress):
            tokens = self.denoise_latents(
                parameters, encoding, seed=seed, image_index=image_index, latents=latents, initial=initial
            )
            frames = mx.stack(list(self.decode_frames(parameters, tokens)))
            finish(frames)
        return frames

    def denoise_latents(
        self,
        parameters: GenerationParameters,
        encoding: GuidanceEncoding,
        *,
        seed: int = 0,
        image_index: int = 0,
        latents: mx.array | np.ndarray | None = None,
        initial: InitialImage | None = None,
        progress: ProgressCallback | None = None,
    ) -> mx.array:
        """The first half of `generate_pixels`: packed clean latents (1, N, 64) in the model's dtype, evaluated."""
        config, variant, references = self.components.config(TRANSFORMER), self.variant, encoding.references
        if variant.takes_images != bool(references):
            kinds = ("works on pictures", "none") if variant.takes_images else ("paints from text", "pictures")
            raise RequestError("{} {}; the encoding holds {}".format(self.model, *kinds))
        if variant.max_images is not None and len(references) > variant.max_images:
            raise RequestError(
                f"{self.model} works on {variant.max_images} picture, but the encoding has {len(references)}"
            )
        if variant.layered and initial is not None:
            raise RequestError(f"{self.model} takes a picture apart; it does not paint one over")
        frames, height, width = self._grid(parameters)
        schedule = self._schedule(parameters, height * width, references)
        start = self._start(
            parameters,
            schedule,
            (frames, height, width),
            check_seed(seed),
            check_image_index(image_index),
            latents,
            initial,
        )
        if start.blended and variant.samples_references:
            assert start.image is not None
            references = (Reference(start.image, height, width),)
        grids = [(height, width)] * frames + [(r.height, r.width) for r in references]
        segments = place_images(grids, config.use_layer3d_rope)
        negative = encoding.negative if parameters.cfg_scale > 1 else None
        if parameters.cfg_scale > 1 and negative is None:
            logger.warning("guidance %g has no effect: the encoding has no negative prompt", parameters.cfg_scale)
        branches = [encoding.positive] if negative is None else [encoding.positive, negative]
        for states in branches:
            self._check_states(states, segments)

        renormalize = variant.renormalize if parameters.cfg_normalize is None else parameters.cfg_normalize
        with self._working(progress):
            table = self._modulation(start.schedule)
            transformer = self.components.network(TRANSFORMER)
            text = [transformer.project_text(states.astype(self.dtype)) for states in branches]
            rotary = [rotary_tables(segments, states.shape[1], config.axes_dims_rope) for states in branches]
            shown = None
            if references:
                shown = mx.concatenate([r.latents for r in references], axis=1).astype(self.dtype)
                shown = transformer.project_references(shown)
            mx.eval(text, rotary, [] if shown is None else shown)
            steps, sigmas = start.schedule.num_steps, start.schedule.sigmas
            self._report(Progress("denoise", 0, steps, sigma=float(sigmas[0]), latents=start.latents))
            with self.components.passing(TRANSFORMER) as pace:
                result = denoise(
                    lambda x, step: transformer.velocities(x, text, table[step], rotary, shown, on_layer=pace),
                    start.latents,
                    start.schedule,
                    None if negative is None else Guidance(parameters.cfg_scale, renormalize),
                    lambda n, x: self._report(Progress("denoise", n, steps, sigma=float(sigmas[n]), latents=x)),
                    start.blend if start.blended else None,
                )
        if not all_finite(result):
            raise QwenImageError("the painted latents are not finite: try --dtype bfloat16, or check the weights")
        return result

    def decode_frames(
        self, parameters: GenerationParameters, latents: mx.array, *, progress: ProgressCallback | None = None
    ) -> Iterator[mx.array]:
        """The second half of `generate_pixels`, a frame at a time, so that layers never share the memory.

        Args:
            parameters: those of the first half.
            latents: what `denoise_latents` returned.
            progress: replaces the pipeline's own callback.

        Yields:
            Pixels (height, width, channels) in [0, 1], fp32, evaluated; back to front with a layered model, whose first
            frame, the whole picture, is left out.
        """
        frames, height, width = self._grid(parameters)
        unpacked = unpack_multi_layer_latents(latents, frames, 2 * height, 2 * width)[0]
        first = 1 if self.variant.layered else 0
        strips = strips_of(parameters.width * parameters.height, self.strip_pixels)
        for n in range(first, frames):
            with self._working(progress):
                decoder = self.components.network(VAE_DECODER)
                with self._report.stage("decode", f"layer {n}" if first else ""):
                    pixels = decode(decoder, self.components.config(VAE), unpacked[n : n + 1], strips)[0]
            if not all_finite(pixels):
                raise QwenImageError("the decoded picture is not finite: check the autoencoder's weights")
            yield pixels

    @contextmanager
    def _working(self, progress: ProgressCallback | None) -> Iterator[None]:
        """Keeps to limits and tells a callback meanwhile; a fault of the GPU unloads everything: it may hold zeros."""
        try:
            with limits(), gpu_faults(), self._report.using(progress):
                yield
        except BaseException as error:
            with suppress(RuntimeError):
                mx.synchronize()  # what is still queued ends here, and its errors do not meet the next call
            if isinstance(error, GPUError):
                self._table = None
                self.components.release_all()
            raise

    # Steps of the above -------------------------------------------------------------------------------------------

    def _open_images(self, images: Sequence[ImageSource]) -> list[PILImage]:
        images, limit = listed(images), self.variant.max_images
        if self.variant.takes_images and not images:
            raise RequestError(f"{self.model} works on pictures; give it at least one")
        if images and not self.variant.takes_images:
            raise RequestError(f"{self.model} paints from text; only an editing model takes pictures to work on")
        if limit is not None and len(images) > limit:
            raise RequestError(f"{self.model} works on {limit} picture at a time, but {len(images)} are given")
        return [open_rgba(image) if self.variant.layered else open_image(image) for image in images]

    def _grid(self, parameters: GenerationParameters) -> tuple[int, int, int]:
        """Frames, and rows and columns of each frame's tokens."""
        side = 2 * self.components.config(VAE).spatial_factor
        frames = parameters.num_layers + 1 if self.variant.layered else 1
        return frames, parameters.height // side, parameters.width // side

    def _start(
        self,
        parameters: GenerationParameters,
        schedule: Schedule,
        grid: tuple[int, int, int],
        seed: int,
        image_index: int,
        latents: mx.array | np.ndarray | None,
        initial: InitialImage | None,
    ) -> Start:
        if latents is not None:
            shape = (1, math.prod(grid), self.components.config(TRANSFORMER).in_channels)
            if tuple(latents.shape) != shape:
                raise RequestError(
                    f"latents have the shape {tuple(latents.shape)}, but "
                    f"{parameters.width}x{parameters.height} pixels need {shape}"
                )
            latents = mx.array(latents)
        if initial is not None and initial.mean.shape[1:3] != (2 * grid[1], 2 * grid[2]):
            factor = self.components.config(VAE).spatial_factor
            height, width = (factor * side for side in initial.mean.shape[1:3])
            raise RequestError(
                f"the initial image was encoded at {width}x{height}, not at {parameters.width}x{parameters.height}"
            )
        return draw_start(
            self.components.config(VAE), schedule, parameters, grid, seed, image_index, latents, initial, self.dtype
        )

    def _check_states(self, states: mx.array, segments: Sequence[Segment]) -> None:
        dim = self.components.config(TRANSFORMER).joint_attention_dim
        if states.ndim != 3 or states.shape[0] != 1 or states.shape[2] != dim:
            raise RequestError(
                f"the encoding has the shape {tuple(states.shape)}, but this model needs (1, tokens, {dim})"
            )
        self._check_length(states.shape[1], text_start(segments))

    @staticmethod
    def _check_length(tokens: int, start: int = 0) -> None:
        if start + tokens > MAX_POSITION:
            raise RequestError(
                f"{tokens} prompt tokens after the {start} positions of pictures reach past {MAX_POSITION}; shorten "
                "the prompt or make the pictures smaller"
            )

    def _schedule(
        self, parameters: GenerationParameters, frame_tokens: int, references: Sequence[Reference]
    ) -> Schedule:
        config = self.components.scheduler_config
        if parameters.shift is not None:
            config = static_shift(config, parameters.shift)
        sigmas = parameters.sigmas or uniform_sigmas(parameters.num_inference_steps)
        if self.variant.shift_by_root:
            mu = root_mu(references[0].height * references[0].width)
        else:
            mu = exponential_mu(config, frame_tokens)
        return make_schedule(config, sigmas, mu)

    def _modulation(self, schedule: Schedule) -> list[Modulation]:
        """The table for a schedule; the last one is kept, so a sweep over seeds makes it once."""
        if self._table is None or not np.array_equal(self._table[0].sigmas, schedule.sigmas):
            self._table = None
            weights = self.components.weights(TRANSFORMER)
            zero_cond_t = self.components.config(TRANSFORMER).zero_cond_t
            adapters = self.components.adapters
            with self._report.stage("load", "modulation"):
                table = modulation_table(weights, schedule.timesteps, self.dtype, zero_cond_t, adapters)
                self._table = schedule, table
        return self._table[1]
