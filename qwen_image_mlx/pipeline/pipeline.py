"""The public pipeline: opening a checkpoint, painting in one call, and explicit control of memory.

The core calls it inherits have no policy; the conveniences here have one that can be turned off (`staged`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from ..errors import RequestError
from ..images.canvas import Canvas, plan_canvas
from ..images.colour import alpha_range
from ..images.files import recorded
from ..images.geometry import Size
from ..images.pixels import to_images
from ..images.sources import ImageSource, listed, open_image, open_mask, open_rgba
from ..names import CaptionLanguage, Dtype, LayersSize, LoRAMode, NamedSize, Rng, Streamable, StrPath, Task
from ..variants import DEFAULT_MODEL
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot
from .components import Components
from .conditioning import Encodings, GuidanceEncoding, InitialImage
from .foreign_names import Answering, answering
from .limits import limits
from .metadata import describe
from .parameters import DTYPES, GenerationParameters, check_num_images, explicit_size
from .progress import Progress, ProgressCallback, Shown
from .releasable import ReleasablePipeline, lora_reader
from .reporter import Reporter
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from ..lora.fetch import LoRAReference
    from .decomposition import LayeredResult

logger: logging.Logger = logging.getLogger(__name__)


class QwenImagePipeline(Answering, ReleasablePipeline):
    """Pictures from text and from pictures, with a Qwen-Image checkpoint. Make one with `from_pretrained`."""

    @classmethod
    @answering
    def from_pretrained(
        cls,
        model: StrPath = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        dtype: Dtype = "bfloat16",
        offline: bool = False,
        zero_cond_t: bool | None = None,
        quantize: Quantization | str | int | None = None,
        loras: Sequence[LoRAReference] = (),
        lora_mode: LoRAMode = "auto",
        transformer: StrPath | None = None,
        text_encoder: StrPath | None = None,
        vae: StrPath | None = None,
        streamed: Collection[Streamable] = (),
        progress: ProgressCallback | None = None,
    ) -> QwenImagePipeline:
        """Opens a checkpoint; weights are fetched and loaded when they are first needed.

        Args:
            model: a local directory in the Hugging Face layout, or a repository id.
            revision: branch, tag or commit; None is the default branch.
            dtype: "bfloat16", "float16" or "float32", for the text encoder and the transformer.
            offline: never ask the network.
            zero_cond_t: overrides the transformer's flag, for files that lost it; None obeys the checkpoint.
            quantize: pack matrices while they are loaded: 4 or "mxfp8" (the transformer; the text encoder takes 8),
                "transformer=4,text_encoder=8,vision=none", or a `Quantization`; None loads them as they are stored.
            loras: `REF` or `REF@STRENGTH`, or (REF, strength); REF is a file, a folder, `owner/repo`,
                `owner/repo:file` or the address of a file on the hub. Read with the transformer's config.
            lora_mode: "merge" into the weights, "side" to run beside them, "auto" to merge unless the weights are
                packed already or too coarse.
            transformer, text_encoder, vae: a .safetensors or .gguf file, or a folder, to take instead of the
                checkpoint's own; its configs are the checkpoint's, corrected by what the file shows.
            streamed: of "transformer", "text_encoder" and "vision", those whose layers are never held: each pass reads
                them from the files again. Same pixels, less memory, more time; the transformer is read once a step.
            progress: told of downloads, loading and work; it can cancel.

        Raises:
            HubError: the hub has no such model, or cannot be reached and nothing is cached.
            CheckpointError: the files are not those of a pipeline this package runs.
        """
        if not isinstance(model, str | os.PathLike) or not os.fspath(model):
            raise RequestError(f"model is {model!r:.80}, but must be a directory or a model's id")
        if isinstance(quantize, str | int) and not isinstance(quantize, bool):
            quantize = Quantization.parse(quantize)
        if not isinstance(quantize, Quantization | None):
            raise RequestError(f"quantize is {quantize!r:.80}, but must be bits, component=bits, or None")
        if dtype not in DTYPES:
            raise RequestError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
        report = Reporter(progress)
        snapshot = HubSnapshot(
            model,
            revision=revision,
            offline=offline,
            progress=report.download,
        )
        replaced = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        components = Components(
            snapshot, getattr(mx, dtype), lambda name: report.stage("load", name), zero_cond_t=zero_cond_t,
            quantization=quantize,
            read_loras=lora_reader(loras, lora_mode, offline, report) if loras else None,
            replaced={name: path for name, path in replaced.items() if path is not None}, streamed=streamed,
            on_layer=lambda name, layer, layers: report(Progress("layer", layer, layers, name)),
        )  # fmt: skip
        return cls(components, report)

    # Painting in one call -----------------------------------------------------------------------------------------

    @answering
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        strength: float = 0.6,
        mask_padding: int | None = None,
        size: NamedSize | Size | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        num_images: int = 1,
        rng: Rng = "torch",
        composite: bool = True,
        staged: bool = True,
        progress: Shown = None,
    ) -> list[PILImage]:
        """Paints from text, or paints a picture over with a text-to-image model.

        Args:
            prompt: what to paint.
            negative_prompt: what to avoid; None paints without guidance, as the reference does.
            image: a picture to start from.
            mask: white where the picture is painted anew; the rest comes back bit by bit.
            strength: how much of the picture is painted anew, above 0 and at most 1.
            mask_padding: paint only the mask's surroundings, with so many pixels around it.
            size: with an image, "1mp" (about 1 MP at its aspect), "source" (its own size) or (width, height); None is
                "source" with a composited mask, else "1mp".
            width, height: the same as two numbers, multiples of 16; None is the model's own size without an image,
                1328x1328 for the released ones.
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation; without a negative prompt
                guidance has no effect.
            seed: of the initial noise.
            num_images: pictures from this seed, each with its own noise.
            rng: "torch" or "mlx".
            composite: with a mask, put the picture back where the mask is black; False returns the model's own pixels.
            staged: release the encoders before painting, so that they and the transformer never share the memory.
            progress: told of every stage and step, and can cancel; False shows nothing. None shows progress bars on
                stderr, unless the pipeline was opened with a callback.

        Returns:
            PIL images. Each carries how it was made, as JSON in `info["qwen_image_mlx"]`, and keeps it when it is
            saved as PNG, JPEG or WebP.

        Raises:
            RequestError: a parameter is out of range, or a picture cannot be read.
        """
        self.check_task("generate")
        canvas = None
        if size is None:
            size = explicit_size(width, height)
        if image is not None:
            canvas = self.plan_canvas(
                [open_image(image)],
                mask=None if mask is None else open_mask(mask),
                size=size,
                composite=composite,
                crop_padding=mask_padding,
            )
        elif mask is not None or mask_padding is not None or isinstance(size, str):
            raise RequestError("a mask, a padding around it, and a size by name need an image to be painted over")
        parameters = self._parameters(
            canvas.size if canvas else cast("Size | None", size) or self.variant.size_of("1:1"),
            num_inference_steps, 1.0 if cfg_scale is None and negative_prompt is None else cfg_scale, rng, strength,
        )  # fmt: skip
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            parameters=parameters,
            seeds=(seed,),
            image_indices=range(check_num_images(num_images)),
            canvas=canvas,
        )
        return self._paint(request, staged, progress)

    @answering
    def edit(
        self,
        prompt: str,
        *,
        images: Sequence[ImageSource],
        mask: ImageSource | None = None,
        negative_prompt: str | None = " ",
        size: NamedSize | Size | None = None,
        strength: float = 0.6,
        mask_padding: int | None = None,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        num_images: int = 1,
        rng: Rng = "torch",
        reference_pixels: int | None = None,
        composite: bool = True,
        keep_alpha: bool = False,
        staged: bool = True,
        progress: Shown = None,
    ) -> list[PILImage]:
        """Edits pictures with an editing model.

        Args:
            prompt: what to change.
            images: the pictures: PIL images, uint8 arrays, paths or bytes; each is shown at its own size.
            mask: white where the first picture is painted anew; the rest comes back bit by bit.
            negative_prompt: what to avoid; None paints without guidance.
            size: "1mp" (about 1 MP at the picture's aspect), "source" (the picture's own size) or (width, height);
                None is "source" with a composited mask, else "1mp".
            strength: with a mask, how much of what is inside is painted anew, above 0 and at most 1.
            mask_padding: with a mask, paint only its surroundings, with so many pixels around it.
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation.
            seed, num_images, rng: as in `generate`.
            reference_pixels: at most so many pixels of each picture are shown to the transformer.
            composite: with a mask, put the picture back where the mask is black.
            keep_alpha: give the result the picture's transparency.
            staged, progress: as in `generate`.

        Returns:
            PIL images.

        Raises:
            RequestError: a parameter is out of range, a picture cannot be read, or the model does not edit.
        """
        self.check_task("edit")
        sources = listed(images)
        straight = [open_rgba(source) for source in sources] if keep_alpha else None
        pictures = self._open_images(sources)
        canvas = self.plan_canvas(
            pictures,
            mask=None if mask is None else open_mask(mask),
            size=size,
            composite=composite,
            crop_padding=mask_padding,
            straight=straight,
        )
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            parameters=self._parameters(canvas.size, num_inference_steps, cfg_scale, rng, strength),
            seeds=(seed,),
            image_indices=range(check_num_images(num_images)),
            images=tuple(pictures),
            canvas=canvas,
            reference_pixels=reference_pixels,
        )
        return self._paint(request, staged, progress)

    @answering
    def decompose(
        self,
        image: ImageSource,
        prompt: str = "",
        *,
        negative_prompt: str | None = " ",
        num_layers: int = 4,
        resolution: int | None = None,
        size: LayersSize = "source",
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        cfg_normalize: bool = False,
        caption_language: CaptionLanguage = "en",
        seed: int = 0,
        rng: Rng = "torch",
        staged: bool = True,
        progress: Shown = None,
    ) -> LayeredResult:
        """Takes a picture apart into layers, with a layered model.

        Args:
            image: the picture; without alpha it counts as opaque.
            prompt: what the whole picture shows; if it is empty the model writes a caption itself.
            negative_prompt: what to avoid; None works without guidance.
            num_layers: 1 … 8.
            resolution: 640 (which None is) or 1024; the model works at that squared, in pixels, at the picture's
                aspect.
            size: of the layers, "source" (the picture's) or "bucket" (the model's).
            num_inference_steps, cfg_scale: None takes the checkpoint's recommendation.
            cfg_normalize: guidance keeps the length of each token's velocity.
            caption_language: "en" or "zh".
            seed, rng, staged, progress: as in `generate`.

        Raises:
            RequestError: a parameter is out of range, the picture cannot be read or is transparent everywhere, or the
                model is not layered.
        """
        from .decomposition import layers_request  # here: most runs make no layers

        self.check_task("decompose")
        request = layers_request(
            open_rgba(image), prompt, negative_prompt=negative_prompt, num_layers=num_layers, resolution=resolution,
            resolutions=self.variant.resolutions, size=size, cfg_normalize=cfg_normalize,
            caption_language=caption_language, seed=seed, rng=rng,
            sampling=self.recommended.unless(num_inference_steps=num_inference_steps, cfg_scale=cfg_scale),
        )  # fmt: skip
        with limits(), self._report.shown(progress):
            encoding = self.encoded(request)
            if staged:
                self.release_encoders()
            return self.decompose_request(request, encoding)

    def check_task(self, task: Task) -> None:
        """Raises RequestError unless the checkpoint is made for "generate", "edit" or "decompose"."""
        if self.variant.task != task:
            raise RequestError(f"{self.model} is not a model to {task} with: use {self.variant.task}")

    def plan_canvas(
        self,
        pictures: Sequence[PILImage],
        *,
        mask: PILImage | None = None,
        size: NamedSize | Size | None = None,
        composite: bool = True,
        crop_padding: int | None = None,
        straight: Sequence[PILImage] | None = None,
    ) -> Canvas:
        """How a picture is painted over, or gives an edit its size: with a mask the first, else the model's choice.

        Args:
            pictures: upright, RGB.
            mask, size, composite, crop_padding: as in `images.canvas.plan_canvas`.
            straight: the same pictures with their transparency, RGBA, if the result is to have it.
        """
        index = 0 if mask is not None else self.variant.size_from
        return plan_canvas(
            pictures[index],
            mask=mask,
            size=size,
            composite=composite,
            crop_padding=crop_padding,
            straight=None if straight is None or alpha_range(straight[index])[0] == 255 else straight[index],
            area=self.variant.target_area,
        )

    def encode_request(self, request: Request, progress: ProgressCallback | None = None) -> GuidanceEncoding:
        """`encode_guidance_prompts` for a request; the negative prompt is left out where it would change nothing.

        Where a layered model is given no prompt it captions the picture, always with the same draws: a seed stands for
        the noise alone.
        """
        prompt = request.prompt
        if self.writes_caption(request):
            assert request.caption_language is not None
            assert request.reference_pixels is not None
            prompt = self.caption_image(
                request.images[0], language=request.caption_language,
                resolution=math.isqrt(request.reference_pixels), progress=progress,
            )  # fmt: skip
            logger.info("caption: %s", prompt)
        return self.encode_guidance_prompts(
            prompt,
            request.guiding_prompt,
            images=request.images,
            reference_pixels=request.reference_pixels,
            progress=progress,
        )

    def encoded(
        self, request: Request, progress: ProgressCallback | None = None, cache: Encodings | None = None
    ) -> GuidanceEncoding:
        """A request's prompts and pictures, encoded now or by an earlier run; all files are fetched and checked before.

        Args:
            request: what is to be painted.
            progress: told of every stage, and can cancel.
            cache: of earlier runs; what is encoded now is put there.
        """
        self.prepare()
        encoding = cache.get(self, request) if cache else None
        if encoding is None:
            encoding = self.encode_request(request, progress)
            if cache:
                cache.put(self, request, encoding)
        return encoding

    def encode_canvas(self, request: Request, progress: ProgressCallback | None = None) -> InitialImage | None:
        """`encode_initial_image` for a request; None where nothing is painted over."""
        if not self.starts_from_canvas(request):
            return None
        canvas = request.canvas
        assert canvas is not None
        picture, mask = canvas.initial
        if not math.isclose(picture.width / picture.height, canvas.size[0] / canvas.size[1], rel_tol=0.05):
            logger.warning(
                "a picture of %dx%d pixels is stretched to %dx%d to be painted over", *picture.size, *canvas.size
            )
        return self.encode_initial_image(picture, canvas.size, mask, progress=progress)

    def writes_caption(self, request: Request) -> bool:
        """Whether the model says itself what the picture shows."""
        return self.variant.captions and not request.prompt.strip()

    def starts_from_canvas(self, request: Request) -> bool:
        """Whether a request's pictures begin with its canvas: an edit without a mask begins with noise alone."""
        return request.canvas is not None and (request.canvas.mask is not None or not self.variant.takes_images)

    def paint_encoded(
        self,
        request: Request,
        encoding: GuidanceEncoding,
        progress: ProgressCallback | None = None,
        *,
        release_encoders: bool = False,
        release: bool = False,
    ) -> Iterator[tuple[PILImage, int, int]]:
        """Encodes what is painted over, if anything is, then does `paint_request`; may drop the encoders between."""
        initial = self.encode_canvas(request, progress)
        if release_encoders:
            self.release_encoders()
        yield from self.paint_request(request, encoding, initial, progress, release)

    @contextmanager
    def keeping(self, streamed: Collection[str], strip_pixels: int) -> Iterator[None]:
        """Meanwhile reads the layers of these components from their files, and decodes at most so many pixels at once.

        What was loaded otherwise is released, before and afterwards.
        """
        before = self.components.streamed, self.strip_pixels
        self.components.stream(streamed)
        self.strip_pixels = strip_pixels
        try:
            yield
        finally:
            self.components.stream(before[0])
            self.strip_pixels: int = before[1]

    def paint_request(
        self,
        request: Request,
        encoding: GuidanceEncoding,
        initial: InitialImage | None,
        progress: ProgressCallback | None = None,
        release: bool = False,
    ) -> Iterator[tuple[PILImage, int, int]]:
        """Paints a request's pictures, (picture, seed, index) each; may drop the transformer after the last."""
        draws = list(product(request.seeds, request.image_indices))
        for seed, index in draws:
            latents = self.denoise_latents(
                request.parameters, encoding, seed=seed, image_index=index, initial=initial, progress=progress
            )
            if release and (seed, index) == draws[-1]:
                self.release_transformer()
            for frame in self.decode_frames(request.parameters, latents, progress=progress):
                (image,) = to_images(frame[None])
                yield request.canvas.finish(image) if request.canvas else image, seed, index

    def decompose_request(
        self,
        request: Request,
        encoding: GuidanceEncoding,
        progress: ProgressCallback | None = None,
        release: bool = False,
    ) -> LayeredResult:
        """Paints a request's layers, each decoded, resized and turned into 8 bits before the next."""
        from .decomposition import layered_result  # here: most runs make no layers

        pictures = [image for image, _, _ in self.paint_request(request, encoding, None, progress, release)]
        return layered_result(pictures, request, describe(self, request, encoding, request.seeds[0]))

    def _paint(self, request: Request, staged: bool, progress: Shown) -> list[PILImage]:
        with limits(), self._report.shown(progress):
            encoding = self.encoded(request)
            return [
                recorded(image, describe(self, request, encoding, seed, index))
                for image, seed, index in self.paint_encoded(request, encoding, release_encoders=staged)
            ]

    def _parameters(
        self, size: Size, steps: int | None, cfg_scale: float | None, rng: Rng, strength: float
    ) -> GenerationParameters:
        return GenerationParameters(
            width=size[0],
            height=size[1],
            rng=rng,
            strength=strength,
            **self.recommended.unless(num_inference_steps=steps, cfg_scale=cfg_scale),
        )
