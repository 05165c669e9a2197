"""Pictures from anywhere, for the models: PIL images, arrays, paths, bytes; upright and in 8 bits."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import RequestError
from .pixels import on_white

logger = logging.getLogger(__name__)

ImageSource = Image.Image | np.ndarray | str | os.PathLike | bytes


def listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """Pictures as a list; a single one may be given without. Raises RequestError for anything else."""
    if isinstance(images, ImageSource):
        return [images]
    try:
        return list(images)
    except TypeError as error:
        raise RequestError(f"pictures are {images!r:.80}, but must be a list of pictures, or one") from error


def open_image(source: ImageSource) -> Image.Image:
    """A picture as an upright RGB image: EXIF orientation applied, transparency laid on white, first frame only.

    Args:
        source: a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), a path, or a file's bytes.

    Raises:
        RequestError: it cannot be read, is too large to be decoded safely, or has values that are no 8 or 16 bits.
    """
    image = open_rgba(source)
    if image.getextrema()[3][0] < 255:
        logger.warning("%s has transparent parts; they are laid on white", _name(source))
    return on_white(image)


def open_rgba(source: ImageSource) -> Image.Image:
    """A picture as an upright RGBA image, opaque if it has no alpha; raises RequestError as `open_image` does."""
    return _decoded(source).convert("RGBA")


def check_visible(picture: Image.Image) -> None:
    """Raises RequestError if an RGBA picture shows nothing."""
    if picture.getextrema()[3][1] == 0:
        raise RequestError("the picture is transparent everywhere, so there is nothing to see in it")


def open_mask(source: ImageSource) -> Image.Image:
    """A mask as an upright picture; raises RequestError as `open_image` does."""
    return _decoded(source)


def _decoded(source: ImageSource) -> Image.Image:
    """Upright, whole, in 8 bits."""
    if not isinstance(source, ImageSource):
        raise RequestError(
            f"a picture is of type {type(source).__name__}; give a PIL image, an array, a path or a file's bytes"
        )
    name = _name(source)
    with readable(name):
        if isinstance(source, np.ndarray):
            return _in_8_bits(Image.fromarray(source), f"an array {source.shape} of {source.dtype}")
        if isinstance(source, Image.Image):
            return _in_8_bits(ImageOps.exif_transpose(source), name)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s is animated; its first frame is used", name)
            image.load()
            return _in_8_bits(ImageOps.exif_transpose(image), name)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Makes whatever Pillow raises while it reads a picture a RequestError about `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError as error:
        raise RequestError(f"there is no picture {name}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name} is too large to be opened safely; make it smaller") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} is not a picture in a format that can be read") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise RequestError(f"{name} cannot be read as a picture: {error}") from error


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RequestError(f"{name} has values of 32 bits; give uint8 of (height, width, 3 or 4), or a usual picture")
    if not image.width * image.height:
        raise RequestError(f"{name} has no pixels")
    if image.info.get("icc_profile", b"")[16:20] != b"RGB ":
        image.info.pop("icc_profile", None)  # of colours that it no longer has
    if image.mode in ("LAB", "HSV", "YCbCr", "CMYK"):
        return image.convert("RGB") if image.mode != "LAB" else _from_lab(image)
    return image


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "a picture"
