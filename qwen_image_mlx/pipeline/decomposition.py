"""Decomposing an image: the request, and the result with its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..images.canvas import plan_canvas
from ..images.colour import alpha_range
from ..images.pixels import on_white
from ..images.sources import ImageSource, check_visible, open_rgba
from ..layers.formats import save_layers
from ..layers.stack import Layer, LayerStack, composite, psnr
from ..names import CaptionLanguage, LayersFormat, LayersSize, Rng, StrPath
from ..variants import CAPTION_TEMPLATES
from .parameters import RNGS, GenerationParameters
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES: tuple[LayersSize, ...] = ("source", "bucket")


@dataclass(frozen=True)
class LayeredResult:
    """A decomposed image.

    Attributes:
        source: the image itself at the layers' size, RGBA.
        stack: its layers on their canvas, with the generation's parameters as metadata.
    """

    source: Image
    stack: LayerStack

    @property
    def layers(self) -> list[Image]:
        """The layers' images, RGBA with straight alpha, back to front."""
        return [layer.image for layer in self.stack.layers]

    @property
    def prompt(self) -> str:
        """The prompt; if it was empty, the caption that the model wrote."""
        prompt: str = self.stack.metadata["prompt"]
        return prompt

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio between the composite and the image, both on white, in dB."""
        return psnr(on_white(self.source), on_white(self.composite()))

    def composite(self) -> Image:
        """The composite of the layers, RGBA."""
        return composite(self.stack)

    def save(self, folder: StrPath, formats: Iterable[LayersFormat] = ("png",)) -> list[Path]:
        """Writes the layers into a folder, either all files or none, and returns their paths.

        Args:
            folder: made if it is missing.
            formats: any of "png" (a file per layer and a manifest), "psd", "ora", "zip", "pptx".

        Raises:
            RequestError: a format is unknown, or its library is not installed.
            OutputError: it could not be written.
        """
        return save_layers(self.stack, folder, formats)


def layered_result(images: Iterable[Image], request: Request, metadata: Mapping[str, Any]) -> LayeredResult:
    """The result of a request from its layers' images, back to front, each of the result's size, and their record."""
    canvas = request.canvas
    assert canvas is not None
    layers = tuple(Layer(image, f"layer {n}") for n, image in enumerate(images))
    return LayeredResult(canvas.resized_source, LayerStack(canvas.result_size, layers, dict(metadata)))


def _selects_nothing(mask: Image) -> bool:
    """Whether an RGBA mask is transparent, or opaque and black, everywhere."""
    low, high = alpha_range(mask)
    return high == 0 or (low == 255 and mask.convert("RGB").getbbox() is None)


def layers_request(
    image: Image,
    prompt: str,
    *,
    resolutions: Sequence[int],
    seed: int,
    sampling: Mapping[str, Any] = {},
    negative_prompt: str | None = " ",
    num_layers: int = GenerationParameters.num_layers,
    resolution: int | None = None,
    size: LayersSize = SIZES[0],
    cfg_normalize: bool = False,
    caption_language: CaptionLanguage = "en",
    rng: Rng = RNGS[0],
    layer_prompt: str | None = None,
    layer_mask: ImageSource | None = None,
) -> Request:
    """A request that decomposes an image. The arguments and their meaning are those of `QwenImagePipeline.decompose`;
    this function has the defaults for all front ends.

    Args:
        resolutions: the model's resolutions, the default first.
        layer_prompt, layer_mask: what one layer shows, in words or as a mask; then only this layer is generated.
        sampling: fields of `GenerationParameters`, such as steps, guidance, shift; they override the defaults.

    Raises:
        RequestError: an argument is out of range, or the image is fully transparent.
    """
    resolution = resolutions[0] if resolution is None else resolution
    for name, value, allowed in (
        ("resolution", resolution, resolutions),
        ("size", size, SIZES),
        ("caption_language", caption_language, tuple(CAPTION_TEMPLATES)),
    ):
        if isinstance(value, list | dict | set) or value not in allowed:
            raise RequestError(f"{name} is {value!r}, but must be {' or '.join(map(str, allowed))}")
    if not isinstance(prompt, str):
        raise RequestError(
            f"the prompt is {prompt!r:.80}, but must be a string; an empty one makes the model write a caption"
        )
    check_visible(image)
    single = layer_prompt is not None or layer_mask is not None
    if layer_prompt is not None:
        if prompt.strip():
            raise RequestError("give a prompt for the whole image, or one for a layer, not both")
        if not layer_prompt.strip():
            raise RequestError("the layer's prompt is empty: say what the layer shows")
        prompt = layer_prompt
    mask = None if layer_mask is None else open_rgba(layer_mask)
    if mask is not None and mask.size != image.size:
        raise RequestError(
            f"the layer's mask has {mask.width}x{mask.height} pixels, but the image {image.width}x{image.height}; "
            "make them equal"
        )
    if mask is not None and _selects_nothing(mask):
        raise RequestError("the layer's mask is black everywhere: make white, or opaque, what the layer shows")
    canvas = plan_canvas(image, size="source" if size == "source" else None, area=resolution**2)
    return Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        parameters=GenerationParameters(
            **{
                "width": canvas.size[0],
                "height": canvas.size[1],
                "num_layers": 1 if single else num_layers,
                "single_layer": single,
                "cfg_normalize": cfg_normalize,
                "rng": rng,
                **sampling,
            }
        ),
        seeds=(seed,),
        images=(image,),
        layer_mask=mask,
        canvas=canvas,
        reference_pixels=resolution**2,
        caption_language=caption_language,
    )
