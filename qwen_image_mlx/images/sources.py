"""Images from anywhere, for the models: PIL images, arrays, paths, bytes; upright, in 8 bits and in sRGB."""

from __future__ import annotations

import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import RequestError
from ..names import StrPath
from .colour import alpha_range, ignore_profiles, in_srgb
from .formats import READABLE, check_file, formats, unreadable
from .pixels import on_white

logger: logging.Logger = logging.getLogger(__name__)

# Pillow's messages about text chunks that are too large.
_TOO_MUCH_TEXT = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")
_DECODERS_RAISE = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
ImageSource = Image.Image | npt.NDArray[Any] | StrPath | bytes
_KINDS = (Image.Image, np.ndarray, str, os.PathLike, bytes)  # the same, for isinstance


def as_list(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """Images as a list; a single image becomes a list of one. Raises RequestError for anything else."""
    if isinstance(images, _KINDS):
        return [images]
    try:
        return list(images)
    except TypeError as error:
        raise RequestError(f"images are {images!r:.80}, but must be a list of images, or one") from error


def open_image(source: ImageSource) -> Image.Image:
    """An image as an upright RGB image: EXIF orientation applied, transparency laid on white, first frame only.

    Colours are converted to sRGB by the image's colour profile, unless `colour.ignore_profiles` is in force.

    Args:
        source: a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), a path, or a file's bytes.

    Raises:
        RequestError: it cannot be read, is too large to be decoded safely, or has values of neither 8 nor 16 bits.
    """
    image = open_rgba(source)
    if alpha_range(image)[0] < 255:
        logger.warning("%s has transparent parts; they are laid on white", _name(source))
    return on_white(image)


def open_rgba(source: ImageSource) -> Image.Image:
    """An image as an upright RGBA image, opaque if it has no alpha; raises RequestError as `open_image` does."""
    return _decode(source).convert("RGBA")


def check_visible(image: Image.Image) -> None:
    """Raises RequestError if an RGBA image is transparent everywhere."""
    if alpha_range(image)[1] == 0:
        raise RequestError("the image is transparent everywhere, so there is nothing to see in it")


def open_mask(source: ImageSource) -> Image.Image:
    """A mask as an upright image, its values as they are; raises RequestError as `open_image` does."""
    with ignore_profiles():
        return _decode(source)


def _decode(source: ImageSource) -> Image.Image:
    """Upright, whole, in 8 bits and sRGB."""
    if not isinstance(source, _KINDS):
        raise RequestError(
            f"an image is of type {type(source).__name__}; give a PIL image, an array, a path or a file's bytes"
        )
    name = _name(source)
    if isinstance(source, str):
        source = os.path.expanduser(source)
    with readable(name, source):
        if isinstance(source, np.ndarray):
            _check_array(source)
            return in_8_bits(Image.fromarray(source), f"an array {source.shape} of {source.dtype}")
        if isinstance(source, Image.Image):
            return in_8_bits(ImageOps.exif_transpose(source), name)
        if not isinstance(source, bytes):
            check_file(source, name)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s is animated; its first frame is used", name)
            image.load()
            return in_8_bits(ImageOps.exif_transpose(image), name)


def _check_array(array: np.ndarray) -> None:
    """Raises RequestError unless an array holds the levels of an image."""
    is_grey_16 = array.dtype == np.uint16 and array.ndim == 2
    if array.dtype not in (np.uint8, bool) and not is_grey_16:
        cure = "x * 255, rounded, as uint8" if array.dtype.kind == "f" else "values from 0 to 255 as uint8"
        raise RequestError(f"an array {array.shape} of {array.dtype} is not an image: give {cure}")


@contextmanager
def readable(name: str, source: ImageSource, taken: str = READABLE) -> Iterator[None]:
    """Turns any error of Pillow while it reads an image into a RequestError.

    Args:
        name: its name in the message.
        source: the image, whose format the message names.
        taken: the formats that are read, as the message lists them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError as error:
        raise RequestError(f"the image {name} does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise RequestError(f"{name} is too large to be opened safely ({limit}); make it smaller") from error
    except UnidentifiedImageError as error:
        raise RequestError(unreadable(cast("StrPath | bytes", source), name, taken)) from error
    except RequestError:
        raise
    except _DECODERS_RAISE as error:
        if isinstance(error, ValueError) and any(words in str(error) for words in _TOO_MUCH_TEXT):
            raise RequestError(f"{name} has too much text or metadata: save it again without metadata") from error
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RequestError(f"{name} cannot be read as an image: {why}") from error


def in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """An image in 8 bits and sRGB; raises RequestError for one without pixels, or with values of 32 bits."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        info = image.info
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.info = info.copy()
    if image.mode in ("I", "F"):
        raise RequestError(f"{name} has values of 32 bits; give uint8 of (height, width, 3 or 4), or an 8-bit image")
    if not image.width * image.height:
        raise RequestError(f"{name} has no pixels")
    if image.mode == "LAB":  # a space that needs no profile
        return _from_lab(image)
    image = in_srgb(image.convert("RGB") if image.mode in ("HSV", "YCbCr") else image, name)
    return image.convert("RGB") if image.mode == "CMYK" else image


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    result = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert result is not None  # None stands for "changed in place"
    result.info = {}
    return result


def _name(source: ImageSource) -> str:
    """What an image is called in messages; long names are cut in the middle."""
    name = str(source) if isinstance(source, str | os.PathLike) else "an image"
    return name if len(name) <= 160 else f"{name[:80]}…{name[-79:]}"
