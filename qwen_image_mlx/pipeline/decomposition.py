"""An image decomposed: what is asked for, and the layers that come of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..images.canvas import plan_canvas
from ..images.pixels import on_white
from ..images.sources import check_visible
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
    """An image decomposed.

    Attributes:
        source: the image itself at the layers' size, RGBA.
        stack: its layers on their canvas, with the parameters that made them as metadata.
    """

    source: Image
    stack: LayerStack

    @property
    def layers(self) -> list[Image]:
        """The layers' images, RGBA with straight alpha, back to front."""
        return [layer.image for layer in self.stack.layers]

    @property
    def prompt(self) -> str:
        """What the model was told the image shows; the caption it wrote itself if it was told nothing."""
        prompt: str = self.stack.metadata["prompt"]
        return prompt

    @property
    def psnr(self) -> float:
        """How near the layers laid together come to the image, both on white, in dB."""
        return psnr(on_white(self.source), on_white(self.composite()))

    def composite(self) -> Image:
        """The layers laid together, RGBA."""
        return composite(self.stack)

    def save(self, folder: StrPath, formats: Iterable[LayersFormat] = ("png",)) -> list[Path]:
        """Writes the layers into a folder, all files or none, and returns their paths.

        Args:
            folder: made if it is missing.
            formats: of "png" (a file per layer and a manifest), "psd", "ora", "zip", "pptx".

        Raises:
            RequestError: a format is unknown, or its library is not installed.
            OutputError: it could not be written.
        """
        return save_layers(self.stack, folder, formats)


def layered_result(images: Iterable[Image], request: Request, metadata: Mapping[str, Any]) -> LayeredResult:
    """What came of a request: its layers' images, back to front, each of the result's size, with their record."""
    canvas = request.canvas
    assert canvas is not None
    layers = tuple(Layer(image, f"layer {n}") for n, image in enumerate(images))
    return LayeredResult(canvas.resized_source, LayerStack(canvas.result_size, layers, dict(metadata)))


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
) -> Request:
    """What decomposing an image asks of a layered model; the arguments are those of `QwenImagePipeline.decompose`,
    and so are the defaults, which every front end leaves to this function.

    Args:
        resolutions: those the model works at, the default first.
        sampling: fields of `GenerationParameters`, such as steps, guidance, shift; they win.

    Raises:
        RequestError: one of them is out of range, or the image shows nothing.
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
        raise RequestError(f"the prompt is {prompt!r:.80}, but must be a string; an empty one asks for a caption")
    check_visible(image)
    canvas = plan_canvas(image, size="source" if size == "source" else None, area=resolution**2)
    return Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        parameters=GenerationParameters(
            **{
                "width": canvas.size[0],
                "height": canvas.size[1],
                "num_layers": num_layers,
                "cfg_normalize": cfg_normalize,
                "rng": rng,
                **sampling,
            }
        ),
        seeds=(seed,),
        images=(image,),
        canvas=canvas,
        reference_pixels=resolution**2,
        caption_language=caption_language,
    )
