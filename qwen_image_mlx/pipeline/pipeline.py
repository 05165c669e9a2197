"""The public pipeline: opens a checkpoint, generates step by step or in one call, and controls memory.

The core calls have no policy: they do not release, cache or print, and they evaluate what they return, because an
unevaluated encoding would keep the text encoder alive. The conveniences go through `conductor.py`, like all front ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .. import registry as r
from ..errors import RequestError
from ..gpu import finish
from ..images.files import with_record
from ..images.geometry import Size, size_of_area
from ..images.sources import ImageSource, as_list, open_rgba
from ..names import CaptionLanguage, Dtype, LayersSize, LoRAMode, NamedSize, Rng, Streamable, StrPath, Task
from ..sampling.latents import LatentSpace
from ..variants import DEFAULT_MODEL, Variant
from ..weights.schemes import Quantization
from . import encode, generation
from .autoencode import STRIP_PIXELS
from .components import Components
from .conditioning import GuidanceEncoding, InitialImage
from .conductor import decompose, generate
from .control import Control, controls_of
from .foreign_names import answering
from .holding import Holding
from .image_request import canvas_or_size, edit_canvas, image_request
from .limits import limits
from .opening import open_components, recommended_of
from .parameters import GenerationParameters, Recommended, check_image_index, check_seed
from .progress import ProgressCallback, Shown
from .reporter import Reporter
from .request import Request
from .sampling_options import SamplingOptions, check_sampling, sampling_of, with_preset
from .seams import ConditionEncoder, ControlInput, DenoiserClass

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from typing_extensions import Unpack  # of `typing` from Python 3.11 on

    from ..lora.fetch import LoRAReference
    from .decomposition import LayeredResult


class QwenImagePipeline(Holding):
    """Images from text and from images, with a Qwen-Image checkpoint. Make one with `from_pretrained`.

    Args:
        components: the checkpoint's components.
        report: receives progress.
        denoiser: makes the denoiser of an image; None uses the one of the transformer's class.

    Attributes:
        components: the checkpoint's components.
        strip_pixels: maximum pixels decoded at once; changes memory, never a bit of the result.
    """

    def __init__(self, components: Components, report: Reporter, denoiser: DenoiserClass | None = None):
        self.components = components
        self._report = report
        self._denoiser: DenoiserClass = denoiser or components.use_of(r.TRANSFORMER)
        self.strip_pixels: int = STRIP_PIXELS

    @classmethod
    @answering
    def from_pretrained(
        cls, model: StrPath = DEFAULT_MODEL, *,
        revision: str | None = None, dtype: Dtype = "bfloat16", offline: bool = False, zero_cond_t: bool | None = None,
        quantize: Quantization | str | int | None = None,
        loras: Sequence[LoRAReference] = (), lora_mode: LoRAMode = "auto",
        transformer: StrPath | None = None, text_encoder: StrPath | None = None, vae: StrPath | None = None,
        streamed: Collection[Streamable] = (), progress: ProgressCallback | None = None,
    ) -> QwenImagePipeline:  # fmt: skip
        """Opens a checkpoint; weights are fetched and loaded when they are first needed.

        Args:
            model: a local directory in the Hugging Face layout, or a repository id.
            revision: branch, tag or commit; None is the default branch.
            dtype: "bfloat16", "float16" or "float32", for the text encoder and the transformer.
            offline: never use the network.
            zero_cond_t: overrides the transformer's flag, for files that lost it; None obeys the checkpoint.
            quantize: quantize matrices while loading: 4 or "mxfp8" (the transformer; the text encoder takes 8),
                "transformer=4,text_encoder=8,vision=none", or a `Quantization`; None loads them as they are stored.
            loras: `REF` or `REF@STRENGTH`, or (REF, strength); REF is a file, a folder, `owner/repo`,
                `owner/repo:file` or the address of a file on the hub. Read with the transformer's config.
            lora_mode: "merge" into the weights, "side" to run unmerged, "auto" to merge unless the weights are
                quantized already or too coarse.
            transformer, text_encoder, vae: a .safetensors or .gguf file, or a folder, to use instead of the
                checkpoint's own, with the checkpoint's configs, corrected by the file's tensors.
            streamed: of "transformer", "text_encoder" and "vision", those whose layers are not kept: each pass reads
                them from the files again. Same pixels, less memory, more time: the transformer is read once a step.
            progress: called for downloads, loading and work; can cancel.

        Raises:
            HubError: the hub has no such model, or cannot be reached and nothing is cached.
            CheckpointError: the files are not those of a pipeline this package runs.
        """
        report = Reporter(progress)
        files = dict(zip(r.FOLDERS, (transformer, text_encoder, vae), strict=True))
        components = open_components(
            model, report, revision=revision, dtype=dtype, offline=offline, zero_cond_t=zero_cond_t, quantize=quantize,
            loras=loras, lora_mode=lora_mode, files=files, streamed=streamed,
        )  # fmt: skip
        return cls(components, report)

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
        """The variant of the checkpoint's pipeline class: template, limits, defaults."""
        return self.components.variant

    @property
    def recommended(self) -> Recommended:
        """The recommended sampling: the model card's, or a distilled LoRA's."""
        return self.recommended_at(None)

    def recommended_at(self, steps: int | None) -> Recommended:
        """The recommended sampling for a number of steps; None is the recommended number."""
        return recommended_of(self.components, steps)

    @property
    def class_name(self) -> str | None:
        """The class of the checkpoint's pipeline, from its index."""
        return self.components.sources.index.get("_class_name")

    @property
    def latent_space(self) -> LatentSpace:
        """The layout of its latents: channels, factor, patch."""
        return self.components.latent_space

    @property
    def transformer_config(self) -> Any:
        """The transformer's config, corrected by its tensors."""
        return self.components.config(r.TRANSFORMER)

    @property
    def quantization(self) -> Quantization:
        """The schemes matrices are quantized to while loading."""
        return self.components.quantization

    @property
    def fingerprint(self) -> str:
        """Identifies the files an encoding depends on: the commit, or a directory's files by name, size and time."""
        return self.components.fingerprint

    def prepare(self) -> None:
        """Fetches and checks all files that generation needs, loading nothing; raises HubError, CheckpointError."""
        self.components.prepare()

    def check_task(self, task: Task) -> None:
        """Raises RequestError unless the checkpoint is made for "generate", "edit" or "decompose"."""
        if task not in self.variant.tasks:
            raise RequestError(f"{self.model} is not a model to {task} with: use {self.variant.task}")

    def encode_guidance_prompts(
        self, prompt: str, negative_prompt: str | None = None, *,
        images: Sequence[ImageSource] = (), reference_pixels: int | None = None, sequential_positions: bool = False,
        progress: ProgressCallback | None = None,
    ) -> GuidanceEncoding:  # fmt: skip
        """Encodes what to generate, what to avoid, and the images to work on; evaluated, independent of the encoders.

        Args:
            prompt: what to generate; may be empty, and is cut at the reference's limit of tokens
                with a warning.
            negative_prompt: what to avoid; None generates without guidance, "" and " " are prompts like any other.
            images: the images an editing or layered model works on: PIL images, uint8 arrays (H, W, 3 or 4), paths
                or bytes.
            reference_pixels: maximum pixels of each reference image that the transformer sees; None is the model's
                own area, about 1 MP. Every reference costs as much time per step as a target of its size.
            sequential_positions: number the tokens 0, 1, 2, … even with images, to compare with libraries that
                have lost the three position axes.
            progress: replaces the pipeline's own callback during the call.

        Raises:
            RequestError: an image cannot be read, or the model does not take this number of images.
            QwenImageError: the encoder's output is not finite, which float16 can cause.
        """
        return encode.encode_guidance_prompts(
            self.components, self._encoder(), self._report, prompt, negative_prompt, images, reference_pixels,
            sequential_positions, progress,
        )  # fmt: skip

    def _encoder(self) -> ConditionEncoder:
        encoder: ConditionEncoder = self.components.use_of(r.TEXT_ENCODER)(self.components)
        return encoder

    def encode_initial_image(
        self, image: ImageSource, size: Size, mask: ImageSource | None = None, *,
        progress: ProgressCallback | None = None,
    ) -> InitialImage:  # fmt: skip
        """Encodes an image to start generation from (image to image), or to keep where a mask is black (inpainting);
        `generate_pixels` takes it as `initial`.

        Args:
            image: the image; resized to `size` whatever its aspect.
            size: (width, height) of the image to be generated, multiples of the model's step.
            mask: grey values; at least a half (white) is regenerated.
            progress: replaces the pipeline's own callback during the call.
        """
        return encode.encode_initial_image(self.components, self._report, image, size, mask, progress)

    def open_controls(self, controls: Sequence[Control]) -> tuple[str, ...]:
        """Fetches and checks ControlNets and their images, loading none; returns the names of their components.

        Raises what `encode_controls` does.
        """
        from .control_networks import open_controls  # here: most images have no control

        return open_controls(self.components, self._report, controls_of(controls))

    def encode_controls(
        self, controls: Sequence[Control], size: Size, *, progress: ProgressCallback | None = None
    ) -> tuple[ControlInput, ...]:
        """Opens ControlNets and encodes their images; `generate_pixels` takes the result as `controls`.

        Args:
            controls: the ControlNets, each with its image.
            size: (width, height) of the image to be generated.
            progress: replaces the pipeline's own callback during the call.

        Raises:
            RequestError, HubError: a reference leads nowhere, an image cannot be read, or a mask is missing.
            CheckpointError: a file is damaged, not a ControlNet, or made for a different model.
        """
        from .control_networks import encode_controls  # here: most images have no control

        return encode_controls(self.components, self._report, controls_of(controls), size, progress)

    def caption_image(
        self, image: ImageSource, *, language: CaptionLanguage = "en", resolution: int = 640, seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> str:  # fmt: skip
        """Captions an image with the checkpoint's own language model; deterministic for a seed.

        Args:
            image: the image; shown on white where it is transparent.
            language, resolution: "en" or "zh"; the image is shown at about `resolution`² pixels.
            seed: the sampling seed, used if the checkpoint's generation_config.json turns sampling on.
            progress: called for every token; can cancel.

        Raises:
            RequestError: the image cannot be read or is fully transparent, or the language is unknown.
            CheckpointError: the checkpoint has no language head or no vision tower.
        """
        return encode.caption_image(
            self.components, self._encoder(), self._report, image, language, resolution, seed, progress
        )

    def output_size(self, images: Sequence[ImageSource]) -> Size:
        """Default (width, height) of an edit of these images: about 1 MP."""
        opened = encode.open_images(self.components, images)
        return size_of_area(self.variant.target_area, opened[self.variant.size_from].size)

    def generate_pixels(
        self, parameters: GenerationParameters, encoding: GuidanceEncoding, *,
        seed: int = 0, image_index: int = 0, latents: mx.array | np.ndarray | None = None,
        initial: InitialImage | None = None, controls: Sequence[ControlInput] = (),
        progress: ProgressCallback | None = None,
    ) -> mx.array:  # fmt: skip
        """Generates one image.

        Args:
            parameters: size, steps, guidance and noise source.
            encoding: from `encode_guidance_prompts`, made by this process or loaded from a file.
            seed: the seed of the initial noise, 0 … 2**64 - 1.
            image_index: the index among the images of one seed, as with the reference's num_images_per_prompt.
            latents: packed initial noise (1, N, C) instead of the seed's.
            initial: from `encode_initial_image`: an image of which `parameters.strength` is regenerated.
            controls: from `encode_controls`.
            progress: replaces the pipeline's own callback during the call; called for every step; can cancel.

        Returns:
            Pixels (frames, height, width, channels) in [0, 1], fp32, evaluated; one RGB frame, or a layered model's
            RGBA layers, back to front.

        Raises:
            RequestError: encoding, latents or initial image do not fit the model or the size.
            Cancelled: the callback cancelled.
            QwenImageError: the result is not finite.
        """
        with self._report.using(progress):
            tokens = self.denoise_latents(
                parameters, encoding, seed=seed, image_index=image_index, latents=latents, initial=initial,
                controls=controls,
            )  # fmt: skip
            frames = mx.stack(list(self.decode_frames(parameters, tokens)))
            finish(frames)
        return frames

    def denoise_latents(
        self, parameters: GenerationParameters, encoding: GuidanceEncoding, *,
        seed: int = 0, image_index: int = 0, latents: mx.array | np.ndarray | None = None,
        initial: InitialImage | None = None, controls: Sequence[ControlInput] = (),
        progress: ProgressCallback | None = None,
    ) -> mx.array:  # fmt: skip
        """The first half of `generate_pixels`: packed clean latents (1, N, C) in the model's dtype, evaluated."""
        return generation.denoise_latents(
            self.components, self._denoiser, self._report, parameters, encoding, seed=check_seed(seed),
            image_index=check_image_index(image_index), latents=latents, initial=initial, controls=controls,
            progress=progress,
        )  # fmt: skip

    def decode_frames(
        self, parameters: GenerationParameters, latents: mx.array, *, progress: ProgressCallback | None = None
    ) -> Iterator[mx.array]:
        """The second half of `generate_pixels`: what `denoise_latents` returned for the same parameters, a frame at a
        time, so that layers never share the memory.

        Yields:
            Pixels (height, width, channels) in [0, 1], fp32, evaluated; back to front with a layered model, whose first
            frame, the whole image, is left out.
        """
        return generation.decode_frames(self.components, self._report, parameters, latents, self.strip_pixels, progress)

    # Conveniences --------------------------------------------------------------------------------------------------

    @answering
    def generate(
        self, prompt: str, *, negative_prompt: str | None = None,
        image: ImageSource | None = None, mask: ImageSource | None = None, strength: float | None = None,
        mask_padding: int | None = None, composite: bool = True,
        size: NamedSize | Size | None = None, width: int | None = None, height: int | None = None,
        controls: Sequence[Control] = (), outpaint: Sequence[int] | None = None,
        num_inference_steps: int | None = None, cfg_scale: float | None = None,
        transparent: bool = False, prefix_cache: bool = True,
        seed: int = 0, num_images: int = 1, rng: Rng = "torch", staged: bool = True, progress: Shown = None,
        **options: Unpack[SamplingOptions],
    ) -> list[PILImage]:  # fmt: skip
        """Generates images from text, or from text and an image, with a text-to-image model.

        Args:
            prompt: what to generate.
            negative_prompt: what to avoid; None generates without guidance, as the reference does.
            image: an image to start from.
            mask: white is inpainted; all other pixels come back bit for bit.
            strength: how much of the image is regenerated, above 0 and at most 1; None is 0.6, or 1 with `outpaint`.
            mask_padding: generate only the mask and this number of pixels around it.
            size: with an image, "1mp" (about 1 MP at its aspect), "source" (its own size) or (width, height); None is
                "source" with a composited mask, else "1mp".
            width, height: the same as two numbers, multiples of 16; None is the model's own size without an image,
                1328x1328 for the released ones.
            controls: ControlNets with their images, which steer the result.
            outpaint: pixels that the image grows to the left, above, to the right and below, instead of a mask.
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation; without a negative prompt
                guidance has no effect.
            transparent: word the prompt for a transparent background, where the model knows how.
            prefix_cache: False computes text and references in every step, where the model would keep them.
            seed, rng: seed and generator of the initial noise; rng is "torch" or "mlx".
            num_images: images from this seed, each with its own noise.
            composite: with a mask, put the image back where the mask is black; False returns the model's own pixels.
            staged: release the encoders before generating, so that they and the transformer never share the memory.
            progress: called for every stage and step; can cancel; False shows nothing. None shows progress bars on
                stderr, unless the pipeline was opened with a callback.
            **options: solver, guidance, step cache and preset: the fields of `SamplingOptions`.

        Returns:
            PIL images. Each has its parameters as JSON in `info["qwen_image_mlx"]`, and keeps them when it is
            saved as PNG, JPEG or WebP. A parameter out of range and an unreadable image raise RequestError.
        """
        self.check_task("generate")
        opened = None if image is None else encode.open_for(self.components, image)
        canvas, plain = canvas_or_size(
            self.variant, opened, mask=mask, size=size, width=width, height=height, composite=composite,
            mask_padding=mask_padding, outpaint=outpaint,
        )  # fmt: skip
        cfg_scale = 1.0 if cfg_scale is None and negative_prompt is None else cfg_scale
        sampling = self._sampling(num_inference_steps, cfg_scale, options)
        request = image_request(
            self.variant, prompt, negative_prompt, (), canvas, sampling, size=plain, seed=seed, num_images=num_images,
            rng=rng, strength=strength, outpaint=outpaint, controls=controls, transparent=transparent,
            prefix_cache=prefix_cache,
        )  # fmt: skip
        return self._generate(with_preset(request, options), staged, progress)

    @answering
    def edit(
        self, prompt: str, *, images: Sequence[ImageSource], negative_prompt: str | None = " ",
        mask: ImageSource | None = None, strength: float | None = None, mask_padding: int | None = None,
        composite: bool = True,
        size: NamedSize | Size | None = None, reference_pixels: int | None = None, keep_alpha: bool = False,
        controls: Sequence[Control] = (), outpaint: Sequence[int] | None = None,
        num_inference_steps: int | None = None, cfg_scale: float | None = None,
        transparent: bool = False, prefix_cache: bool = True,
        seed: int = 0, num_images: int = 1, rng: Rng = "torch", staged: bool = True, progress: Shown = None,
        **options: Unpack[SamplingOptions],
    ) -> list[PILImage]:  # fmt: skip
        """Edits images with an editing model; returns and raises as `generate` does.

        Args:
            prompt: what to change.
            images: the reference images: PIL images, uint8 arrays (H, W, 3 or 4), paths or bytes, of any sizes.
            mask: white is inpainted in the first image; all other pixels come back bit for bit.
            negative_prompt: what to avoid; None generates without guidance.
            size: "1mp" (about 1 MP at the image's aspect), "source" (the image's own size) or (width, height);
                None is "source" with a composited mask, else "1mp".
            strength: with a mask, how much changes inside it, above 0 and at most 1; None is 0.6.
            mask_padding: generate only the mask and this number of pixels around it.
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation.
            seed, num_images, rng, transparent, prefix_cache: as in `generate`.
            reference_pixels: maximum pixels of each reference image that the transformer sees.
            composite: with a mask, put the image back where the mask is black.
            keep_alpha: give the result the image's transparency.
            controls, outpaint: as in `generate`.
            staged, progress, **options: as in `generate`.
        """
        self.check_task("edit")
        sources = as_list(images)
        opened = encode.open_images(self.components, sources)
        canvas = edit_canvas(
            self.variant, sources, opened, mask=mask, size=size, composite=composite, mask_padding=mask_padding,
            keep_alpha=keep_alpha, outpaint=outpaint,
        )  # fmt: skip
        sampling = self._sampling(num_inference_steps, cfg_scale, options)
        request = image_request(
            self.variant, prompt, negative_prompt, opened, canvas, sampling, seed=seed, num_images=num_images, rng=rng,
            strength=strength, outpaint=outpaint, reference_pixels=reference_pixels, controls=controls,
            transparent=transparent, prefix_cache=prefix_cache,
        )  # fmt: skip
        return self._generate(with_preset(request, options), staged, progress)

    @answering
    def decompose(
        self, image: ImageSource, prompt: str = "", *, negative_prompt: str | None = " ",
        num_layers: int = 4, resolution: int | None = None, size: LayersSize = "source",
        num_inference_steps: int | None = None, cfg_scale: float | None = None, cfg_normalize: bool = False,
        caption_language: CaptionLanguage = "en", layer_prompt: str | None = None,
        layer_mask: ImageSource | None = None, seed: int = 0, rng: Rng = "torch", staged: bool = True,
        progress: Shown = None, **options: Unpack[SamplingOptions],
    ) -> LayeredResult:  # fmt: skip
        """Decomposes an image into layers, with a layered model.

        Args:
            image: the image; without alpha it counts as opaque.
            prompt: what the whole image shows; if it is empty, the model writes a caption.
            negative_prompt: what to avoid; None works without guidance.
            num_layers: 1 … 8.
            resolution: 640 (which None is) or 1024; the model works at that squared, in pixels, at the image's
                aspect.
            size: the size of the layers, "source" (the image's) or "bucket" (the model's).
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation.
            cfg_normalize: guidance keeps the length of each token's velocity.
            caption_language: "en" or "zh".
            layer_prompt: what one layer shows, with a model that takes layers by name (Layered-Control); the result has
                this layer alone.
            layer_mask: the same by an image of the image's size (Layered-Control-V2): opaque, or white, where it is.
            seed, rng, staged, progress, **options: as in `generate`, which also lists what is raised.
        """
        from .decomposition import layers_request  # here: most runs make no layers

        self.check_task("decompose")
        request = layers_request(
            open_rgba(image), prompt, negative_prompt=negative_prompt, num_layers=num_layers, resolution=resolution,
            resolutions=self.variant.resolutions, size=size, cfg_normalize=cfg_normalize,
            caption_language=caption_language, seed=seed, rng=rng, layer_prompt=layer_prompt, layer_mask=layer_mask,
            sampling=self._sampling(num_inference_steps, cfg_scale, options),
        )  # fmt: skip
        request = with_preset(request, options)
        check_sampling(self.components, request)
        with limits(), self._report.report_to(progress):
            return decompose(self, request, release_encoders=staged)

    def _sampling(self, steps: int | None, cfg_scale: float | None, options: SamplingOptions) -> dict[str, Any]:
        return sampling_of(self.components, options, num_inference_steps=steps, cfg_scale=cfg_scale)

    def _generate(self, request: Request, staged: bool, progress: Shown) -> list[PILImage]:
        check_sampling(self.components, request)
        with limits(), self._report.report_to(progress):
            images = generate(self, request, release_encoders=staged)
            return [with_record(generated.image, generated.metadata) for generated in images]
