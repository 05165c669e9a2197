"""Makes a `Request` from the arguments of `QwenImagePipeline.generate` and `edit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..images.canvas import Canvas, extend, parse_sides, plan_canvas
from ..images.colour import alpha_range
from ..images.sources import ImageSource, open_mask, open_rgba
from ..names import NamedSize, Rng
from ..registry import CLASSES, TRANSFORMER
from ..variants import Variant
from .control import Control, controls_of
from .parameters import GenerationParameters, check_num_images, explicit_size
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.geometry import Size


def canvas_of(
    variant: Variant,
    images: Sequence[Image],
    *,
    mask: Image | None = None,
    size: NamedSize | Size | None = None,
    composite: bool = True,
    crop_padding: int | None = None,
    straight: Sequence[Image] | None = None,
    outpaint: str | Sequence[int] | None = None,
) -> Canvas:
    """The canvas: the image that is changed, or that gives an edit its size. It is the first image with a mask, else
    the variant's choice.

    Args:
        variant: the model's variant.
        images: upright, RGB.
        mask, size, composite, crop_padding: the arguments of `images.canvas.plan_canvas`.
        straight: the same images as RGBA, if the result keeps their transparency.
        outpaint: pixels that the first image grows to the left, above, to the right and below; instead of a mask.

    Raises:
        RequestError: the sides are impossible, or given with a mask; or as `plan_canvas`.
    """
    if outpaint is not None:
        if mask is not None:
            raise RequestError("give a mask or sides to outpaint, not both")
        sides = parse_sides(outpaint)
        wide, mask = extend(images[0], sides)
        images = [wide, *images[1:]]
        straight = None if straight is None else [extend(straight[0], sides)[0], *straight[1:]]
        if size not in (None, "source") and (isinstance(size, str) or tuple(size) != wide.size):
            raise RequestError(
                f"size is {size!r:.40}, but outpainted by {sides} the image has {wide.width}x{wide.height} pixels: "
                "give no size"
            )
        size = size or "source"  # composited or not
    index = 0 if mask is not None else variant.size_from
    return plan_canvas(
        images[index],
        mask=mask,
        size=size,
        composite=composite,
        crop_padding=crop_padding,
        straight=None if straight is None or alpha_range(straight[index])[0] == 255 else straight[index],
        area=variant.target_area,
    )


def image_request(
    variant: Variant,
    prompt: str,
    negative_prompt: str | None,
    images: Sequence[Image],
    canvas: Canvas | None,
    sampling: Mapping[str, Any],
    *,
    size: Size | None = None,
    seed: int,
    num_images: int,
    rng: Rng,
    strength: float | None,
    outpaint: Sequence[int] | None = None,
    reference_pixels: int | None = None,
    controls: Sequence[Control] = (),
    transparent: bool = False,
    prefix_cache: bool = True,
) -> Request:
    """A request for images of one prompt and seed.

    Args:
        variant: the model's variant.
        images: the images that it works on, opened.
        canvas: the canvas; None generates from text alone.
        sampling: fields of `GenerationParameters`.
        size: (width, height) without a canvas; None is the model's default.
        prompt, negative_prompt, seed, num_images, rng, strength, outpaint, reference_pixels, controls, transparent,
        prefix_cache: as in
            `QwenImagePipeline.edit`.

    Raises:
        RequestError: an argument is out of range, or the model makes no transparent images.
    """
    width, height = canvas.size if canvas else size or variant.size_of("1:1")
    steering = controls_of(controls)
    return Request(
        prompt=control_prompt(variant, transparent_prompt(variant, prompt) if transparent else prompt, steering),
        negative_prompt=negative_prompt,
        parameters=GenerationParameters(
            width=width,
            height=height,
            rng=rng,
            no_prefix_cache=not prefix_cache,
            **start_options(strength, outpaint),
            **sampling,
        ),
        seeds=(seed,),
        image_indices=range(check_num_images(num_images)),
        images=tuple(images),
        canvas=canvas,
        reference_pixels=reference_pixels,
        controls=steering,
    )


def start_options(strength: float | None, outpaint: object) -> dict[str, Any]:
    """The field strength of `GenerationParameters`, or nothing: without one, outpainting regenerates all it adds."""
    if strength is None and outpaint is not None:
        return {"strength": 1.0}
    return {} if strength is None else {"strength": strength}


def control_prompt(variant: Variant, prompt: str, controls: Sequence[Control]) -> str:
    """A prompt with what it begins with for an in-context control, once; without such a control as it is."""
    begins = CLASSES[variant.classes[TRANSFORMER]].in_context
    return begins + prompt.removeprefix(begins) if any(control.in_context for control in controls) else prompt


def transparent_prompt(variant: Variant, prompt: str) -> str:
    """A prompt worded for a transparent background; raises RequestError where the model makes none."""
    if variant.transparent is None:
        raise RequestError("this model makes no transparent images", cause="transparent")
    return variant.transparent(prompt)


def canvas_or_size(
    variant: Variant,
    image: Image | None,
    *,
    mask: ImageSource | None,
    size: NamedSize | Size | None,
    width: int | None,
    height: int | None,
    composite: bool,
    mask_padding: int | None,
    outpaint: Sequence[int] | None = None,
) -> tuple[Canvas | None, Size | None]:
    """The canvas and size of `QwenImagePipeline.generate`: a canvas with an image; without one a size or None.

    Raises:
        RequestError: the mask cannot be read, or an argument that needs an image is given without one.
    """
    size = explicit_size(width, height) if size is None else size
    if image is not None:
        opened_mask = None if mask is None else open_mask(mask)
        canvas = canvas_of(
            variant, [image], mask=opened_mask, size=size, composite=composite, crop_padding=mask_padding,
            outpaint=outpaint,
        )  # fmt: skip
        return canvas, None
    if mask is not None or mask_padding is not None or outpaint is not None or isinstance(size, str):
        raise RequestError("a mask, its padding, outpainting, and a size by name need an image to start from")
    return None, size


def edit_canvas(
    variant: Variant,
    sources: Sequence[ImageSource],
    images: Sequence[Image],
    *,
    mask: ImageSource | None,
    size: NamedSize | Size | None,
    composite: bool,
    mask_padding: int | None,
    keep_alpha: bool,
    outpaint: Sequence[int] | None = None,
) -> Canvas:
    """The canvas of `QwenImagePipeline.edit`; `images` are the sources, opened."""
    return canvas_of(
        variant,
        images,
        mask=None if mask is None else open_mask(mask),
        size=size,
        composite=composite,
        crop_padding=mask_padding,
        straight=[open_rgba(source) for source in sources] if keep_alpha else None,
        outpaint=outpaint,
    )
