"""Images in requests and responses: data URLs and file bytes in three formats. Headers are checked before decoding."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence

from PIL import Image

from ..errors import RequestError
from ..images.sources import readable

FORMATS = ("PNG", "JPEG", "WEBP")
_FORMAT_NAMES = "PNG, JPEG, WebP"
DATA_URL = r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}$"
MAX_PIXELS = 1 << 26  # of all images of a request together: 256 MiB of RGBA
_HEAD = re.compile(r"data:image/(?:png|jpe?g|webp);base64,")
_HEAD_LENGTH = 40
_WEBP_SIDE = 16_383


def image_bytes(text: str) -> bytes:
    """The bytes of a data URL; raises ValueError if it is not a data URL of a PNG, JPEG or WebP."""
    head = _HEAD.match(text[:_HEAD_LENGTH])
    if head is None:
        raise ValueError("must be a data URL of a PNG, JPEG or WebP, such as data:image/png;base64,…")
    try:
        data = base64.b64decode(text[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("is a data URL whose base64 is damaged") from None
    if not data:
        raise ValueError("is a data URL without an image")
    return data


def data_url(png: bytes) -> str:
    """A PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def recode(url: str, kind: str = "png", quality: int | None = None) -> str:
    """Converts a PNG to a different format.

    Returns base64 of the file, without the data URL's head.

    Args:
        url: data URL of the PNG.
        kind: png, jpeg or webp. In a jpeg, transparent areas become white.
        quality: 0 to 100, for jpeg and webp; None is 100.

    Raises:
        RequestError: the image is larger than the format allows.
    """
    text = url.partition(",")[2]
    if kind == "png":
        return text
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    profile = image.info.get("icc_profile")
    if kind == "webp" and max(image.size) > _WEBP_SIDE:
        raise RequestError(f"a WebP has at most {_WEBP_SIDE:,} pixels a side; use output_format png or a smaller size")
    if kind == "jpeg" and image.has_transparency_data:
        under = Image.new("RGBA", image.size, "white")
        under.alpha_composite(image.convert("RGBA"))
        image = under.convert("RGB")
    file = io.BytesIO()
    image.save(file, kind.upper(), quality=100 if quality is None else quality, icc_profile=profile)
    return base64.b64encode(file.getvalue()).decode()


def decode(files: Sequence[bytes]) -> list[Image.Image]:
    """Decodes images. Their total size is checked before any is decoded.

    Raises:
        RequestError: an image is not a PNG, JPEG or WebP, or is damaged; or the images are too large in total.
    """
    opened, pixels = [], 0
    for number, file in enumerate(files, 1):
        with readable(_name(number, files), file, _FORMAT_NAMES):
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        pixels += image.width * image.height
        opened.append(image)
    if pixels > MAX_PIXELS:
        raise RequestError(f"the images have {pixels:,} pixels in total; the maximum is {MAX_PIXELS:,}")
    for number, image in enumerate(opened, 1):
        with readable(_name(number, files), files[number - 1], _FORMAT_NAMES):
            image.load()
    return opened


def _name(number: int, files: Sequence[bytes]) -> str:
    return "the image" if len(files) == 1 else f"image {number}"
