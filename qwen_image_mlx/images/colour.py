"""Applies an image's colour profile once, when it is read; from then on all colours are sRGB.

Pillow and numpy only. An untagged image is taken as sRGB, and one tagged sRGB keeps every bit. Output is
sRGB without a profile, so that pixels and tags agree wherever they go.
"""

from __future__ import annotations

import functools
import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from PIL import Image, ImageCms

from ..outside import one_line

logger: logging.Logger = logging.getLogger(__name__)

_TAGS = ("icc_profile", "gamma", "chromaticity", "srgb")  # how Pillow names them; the last three are chunks of PNG
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space -> the mode that Pillow converts
_NAME = 60  # characters of a profile's name in a message
_SAME = 2  # levels by which the curves of sRGB profiles differ

_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green, blue
_ADOBE_RGB = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_USUAL_GAMMA = 1 / 2.2  # in a PNG it stands for sRGB's own curve
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])
_EXIF_INTEROP, _EXIF_ADOBE_RGB = 0xA005, "R03"


class _Unusable(Exception):
    """A profile that cannot be applied; the text says why."""


@dataclass(frozen=True)
class _Reading:
    ignored: bool = False
    logged: set[object] = field(default_factory=set)

    def say(self, level: int, key: object, text: str, *values: object) -> None:
        """Logs once for each key."""
        if key not in self.logged:
            self.logged.add(key)
            logger.log(level, text, *values)


_USUALLY = _Reading()
_reading: ContextVar[_Reading] = ContextVar("reading", default=_USUALLY)


@contextmanager
def ignore_profiles(ignored: bool = True) -> Iterator[None]:
    """Within it, colour profiles of images are ignored, as diffusers does: their numbers count as sRGB.

    Args:
        ignored: False applies profiles, which is the default without this.
    """
    token = _reading.set(_Reading(bool(ignored)))
    try:
        yield
    finally:
        _reading.reset(token)


def profiles_are_ignored() -> bool:
    """Whether `ignore_profiles` is in force."""
    return _reading.get().ignored


def in_srgb(image: Image.Image, name: str, profile: bytes | None = None) -> Image.Image:
    """The image converted to sRGB, without colour tags; its transparency stays as it is.

    A profile is applied by Little CMS with the perceptual intent. One that is broken, or of a different colour space
    than the image, is named in a warning, and the numbers count as sRGB.

    Args:
        image: of 8 bits a channel: 1, L, LA, P, PA, RGB, RGBA or CMYK.
        name: of the image, for messages.
        profile: an ICC profile that is not in the image itself.

    Returns:
        The same object if it has no colour tags; RGB or RGBA if its colours were converted, else of the same mode.
    """
    tagged = profile is not None or any(tag in image.info for tag in (*_TAGS, "exif"))
    if not tagged:
        return image
    reading = _reading.get()
    plain = image.copy()
    plain.info = {key: value for key, value in image.info.items() if key not in (*_TAGS, "exif")}
    if reading.ignored:
        return plain
    try:
        found = profile if profile is not None else _declared_profile(image)
        return plain if found is None else _convert(plain, found, name, reading)
    except _Unusable as why:
        key = name, profile or image.info.get("icc_profile")
        reading.say(logging.WARNING, key, "%s has a colour profile that cannot be used (%s); its colours are read as "
                    "sRGB", name, why)  # fmt: skip
        return plain


def _declared_profile(image: Image.Image) -> bytes | None:
    """The profile an image's tags state, or None for sRGB or without tags; PNG's precedence: iCCP, sRGB, gAMA."""
    info = image.info
    if "icc_profile" in info:
        if info["icc_profile"] is None:  # what Pillow makes of a chunk that cannot be unpacked
            raise _Unusable("it is damaged")
        return info["icc_profile"] or None
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        return _matrix_profile(info.get("gamma", _USUAL_GAMMA), tuple(info.get("chromaticity", _SRGB)))
    return _matrix_profile(256 / 563, _ADOBE_RGB) if _says_adobe_rgb(image) else None


def _says_adobe_rgb(image: Image.Image) -> bool:
    """Whether a camera's Exif states Adobe RGB, which it may without a profile."""
    try:
        return str(image.getexif().get_ifd(_EXIF_INTEROP).get(1, "")).startswith(_EXIF_ADOBE_RGB)
    except Exception:  # damaged Exif raises many kinds of errors; its colours are then unknown
        return False


def _convert(image: Image.Image, profile: bytes, name: str, reading: _Reading) -> Image.Image:
    description, mode, transform = _transform(profile)
    if transform is None:
        return image
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    colours = image.convert("RGBA") if has_alpha else image
    alpha = colours.getchannel("A") if has_alpha else None
    if mode == "L" and image.mode in ("1", "L", "LA"):
        colours = image.convert("L")
    elif mode == "RGB" and image.mode != "CMYK":
        colours = colours.convert("RGB")
    elif mode != image.mode:
        raise _Unusable(f"it is for {mode}, and the image is {image.mode}")
    result = ImageCms.applyTransform(colours, transform)
    assert result is not None  # None stands for "changed in place"
    if alpha is not None:
        result.putalpha(alpha)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    reading.say(logging.INFO, profile, "%s has the colour profile %s: its colours are converted to sRGB, and so are "
                "those of results", name, description)  # fmt: skip
    return result


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """(name, mode it takes, transform to sRGB, which is None where that would change nothing); raises _Unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if mode is None:
            raise _Unusable(f"it is for {one_line(source.profile.xcolor_space, _NAME)}")
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # its table is coarse in dark greys
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        description = one_line(source.profile.profile_description or "", _NAME) or "without a name"
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        raise _Unusable("it is damaged") from error
    if mode == "CMYK":
        return description, mode, transform
    levels = np.linspace(0, 255, 9).round()
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    probe = np.concatenate([colours, np.arange(256)[:, None].repeat(3, 1)]).astype(np.uint8)[None]
    if mode == "L":
        probe = probe[:, -256:]
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(probe).convert(mode), transform))
    same = np.abs(seen.astype(int) - probe).max() <= _SAME
    return description, mode, None if same else transform


@functools.lru_cache(maxsize=16)
def _matrix_profile(gamma: float, points: tuple[float, ...]) -> bytes:
    """An ICC profile of RGB by its curve and primaries, as PNG's gAMA and cHRM state them; raises _Unusable.

    Args:
        gamma: of encoding; 0.45455 is sRGB's curve.
        points: x and y of white, red, green and blue.
    """
    if len(points) != 8 or not 0.05 <= gamma <= 20 or not all(y > 0 for y in points[1::2]):
        raise _Unusable("its gamma or primaries are out of range")
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(points[::2], points[1::2], strict=True))
    try:
        matrix = np.stack(primaries, 1)
        matrix = matrix * np.linalg.solve(matrix, white)
    except np.linalg.LinAlgError:
        raise _Unusable("its primaries are out of range") from None
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD @ matrix
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 100:
        raise _Unusable("its primaries are out of range")
    usual = abs(gamma - _USUAL_GAMMA) < 0.005 and points != _ADOBE_RGB
    curve = b"para\0\0\0\0" + struct.pack(">Hxx", 3 if usual else 0)
    curve += b"".join(map(_fixed_point, _SRGB_CURVE if usual else (1 / gamma,)))
    name = "of its own gamma and primaries" if points != _ADOBE_RGB else "Adobe RGB"
    text = name.encode("utf-16-be")
    words = b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": words, b"cprt": words, b"wtpt": _xyz(_D50)}
    tags |= {colour + b"XYZ": _xyz(adapted[:, n]) for n, colour in enumerate((b"r", b"g", b"b"))}
    tags |= {colour + b"TRC": curve for colour in (b"r", b"g", b"b")}
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for sign, body in tags.items():
        table += sign + struct.pack(">II", start + len(data), len(body))
        data += body + b"\0" * (-len(body) % 4)
    head = struct.pack(">I4xI12s12x4s", 128 + len(table) + len(data), 0x04300000, b"mntrRGB XYZ ", b"acsp")
    return head.ljust(68, b"\0") + b"".join(map(_fixed_point, _D50)).ljust(60, b"\0") + table + data


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed_point, values))


def _fixed_point(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def alpha_range(image: Image.Image) -> tuple[int, int]:
    """The minimum and maximum alpha of an RGBA image; Pillow's stubs type `getextrema` for one channel only."""
    low, high = cast("tuple[tuple[int, int], ...]", image.getextrema())[3]
    return low, high
