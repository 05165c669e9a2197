"""A contact sheet: many images as one, numbered, with the record of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import RequestError

RECORDS = "contact_sheet"  # the key of a sheet's metadata that holds the records of its images, in order
MAX_IMAGES = 400
_SIDE = 320  # maximum pixels of a thumbnail's side
_GAP, _TEXT = 12, 18


def thumbnail(image: Image.Image) -> Image.Image:
    """A small copy of an image, RGB, on white where it is transparent."""
    small = image.convert("RGBA")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")


def contact_sheet(thumbnails: Sequence[Image.Image], labels: Iterable[str]) -> Image.Image:
    """The thumbnails in rows, each with its number, from 1, and its label below it.

    Args:
        thumbnails: at least one, RGB.
        labels: one for each.
    """
    columns = math.ceil(math.sqrt(len(thumbnails)))
    rows = math.ceil(len(thumbnails) / columns)
    width = max(image.width for image in thumbnails) + _GAP
    height = max(image.height for image in thumbnails) + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (image, label) in enumerate(zip(thumbnails, labels, strict=True)):
        x, y = _GAP + number % columns * width, _GAP + number // columns * height
        sheet.paste(image, (x, y))
        draw.text((x, y + image.height + 2), f"{number + 1}  {label}", "black", font)
    return sheet


def records_of(metadata: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    """The records of a sheet's images; raises RequestError if there are none, or if they are damaged.

    Args:
        metadata: the sheet's.
        path: the file's name, for messages.
    """
    records = metadata.get(RECORDS)
    if (
        not isinstance(records, list)
        or not 0 < len(records) <= MAX_IMAGES
        or not all(isinstance(record, dict) and isinstance(record.get("prompt"), str) for record in records)
    ):
        raise RequestError(f"the metadata of {path} is damaged: its {RECORDS} is not a list of records")
    return records


def pick_record(metadata: Mapping[str, Any], number: int | None, path: str) -> dict[str, Any]:
    """The record to generate again: an image's own, or that of one image of a contact sheet.

    Args:
        metadata: the file's.
        number: the image's, from 1; None for a file that is not a sheet.
        path: the file's name, for messages.

    Raises:
        RequestError: the number is missing, out of range or meaningless, or the sheet is damaged.
    """
    if RECORDS not in metadata:
        if number is not None:
            raise RequestError(f"{path} is one image, not a contact sheet, so there is nothing to pick")
        return dict(metadata)
    records = records_of(metadata, path)
    if number is None:
        raise RequestError(f"{path} is a contact sheet of {len(records)} images: choose one", cause="pick")
    if not 1 <= number <= len(records):
        raise RequestError(f"the number to pick is {number}, but {path} shows images 1 to {len(records)}")
    return dict(records[number - 1])
