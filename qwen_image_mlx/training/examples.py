"""What a model is trained on: a folder of pictures with captions, or a manifest; found and checked before any work.

Knows no model: files in, `Example`s out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, some
from ..images.files import named_path, reason
from .settings import is_text

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANIFEST = "metadata.jsonl"
# The keys of a manifest's lines, by task: what is trained to be painted, what it is painted from, and the words.
_KEYS = {
    "t2i": ("image", None, "caption"),
    "edit": ("target", "source", "instruction"),
    "layered": ("image", "layers", "caption"),
}
_FIELDS = {"source": "sources", "layers": "layers"}


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        caption: of the picture, or the instruction of an edit.
        image: the picture that is learned; of a layered model the one that is taken apart.
        sources: the pictures an edit works on.
        layers: what the picture is taken apart into, back to front.
    """

    caption: str
    image: Path
    sources: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of its pictures."""
        return self.image, *self.sources, *self.layers


def read_examples(data: str | Path, task: str) -> list[Example]:
    """The examples of a folder, or of a manifest.

    A folder holds a `metadata.jsonl`, or, for text to image, pictures with captions in `.txt` files of the same names.

    Args:
        data: a folder, or a JSON-lines file; what it names is beside it.
        task: "t2i" {"image", "caption"}, "edit" {"source", "target", "instruction"; a source may be a list} or
            "layered" {"image", "layers", "caption"}.

    Raises:
        RequestError: there is nothing, or something is missing or damaged; the message names it.
    """
    path = named_path(data, "data")
    if not path.exists():
        raise RequestError(f"the data {str(data)!r} do not exist: give a folder of pictures with captions")
    if not path.is_dir() and not path.is_file():
        raise RequestError(f"the data {str(data)!r} are neither a folder nor a file")
    manifest = path if path.is_file() else path / MANIFEST
    if manifest.is_file():
        examples = _from_manifest(manifest, task)
    elif task != "t2i":
        keys = ", ".join(key for key in _KEYS[task] if key)
        raise RequestError(f"{path} has no {MANIFEST}; training {task} needs one, with {keys} in each line")
    else:
        examples = _from_folder(path)
    if not examples:
        raise RequestError(f"{path} holds nothing to train on: put pictures and their captions into it")
    if missing := [file for example in examples for file in example.files if not os.path.isfile(file)]:
        raise RequestError(f"{len(missing)} pictures are missing: {some(f'{file!s:.300}' for file in missing)}")
    if silent := [example.image for example in examples if not example.caption.strip()]:
        raise RequestError(f"{len(silent)} of {len(examples)} captions are missing or empty: {some(silent)}")
    return examples


def _from_folder(folder: Path) -> list[Example]:
    try:
        pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {reason(error)}") from error
    stems = [file.stem for file in pictures]
    if twice := [file.name for file in pictures if stems.count(file.stem) > 1]:
        raise RequestError(f"pictures share a caption, because only their endings differ: {some(twice)}")
    captions = {file: file.with_suffix(".txt") for file in pictures}
    if missing := [file.name for file, caption in captions.items() if not caption.is_file()]:
        raise RequestError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no caption in a .txt file of the same name: "
            f"{some(missing)}"
        )
    return [Example(_read(caption).strip(), file) for file, caption in captions.items()]


def _from_manifest(manifest: Path, task: str) -> list[Example]:
    examples = []
    for number, line in enumerate(_read(manifest).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {manifest}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON ({error}): correct it") from error
        if not isinstance(row, dict):
            raise RequestError(f"{where} is not a JSON object: correct it")
        examples.append(_example(row, where, manifest.parent, task))
    return examples


def _example(row: dict[str, Any], where: str, folder: Path, task: str) -> Example:
    image, others, words = _KEYS[task]

    def files(key: str, several: bool) -> tuple[Path, ...]:
        value = row.get(key)
        names = value if several and isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise RequestError(f"{where} has no {key}, or not the name of a picture: correct it")
        return tuple(folder / name for name in names)

    caption = row.get(words, "")
    if not isinstance(caption, str) or not is_text(caption):
        raise RequestError(f"{where} has no {words}, or no text in it: correct it")
    found = {_FIELDS[others]: files(others, several=True)} if others else {}
    return Example(caption.strip(), files(image, several=False)[0], **found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text: {error}") from error


def bucket_of(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (width, height) whose aspect is nearest to that of a size."""
    aspect = size[0] / size[1]
    return min(buckets, key=lambda bucket: max(aspect, r := bucket[0] / bucket[1]) / min(aspect, r))


def buckets_of(resolution: int) -> list[tuple[int, int]]:
    """Sizes (width, height) of about resolution² pixels, multiples of 16, up to an aspect of 4:1, for batches to fill.

    Their longer sides are a sixteenth of the resolution apart, so that there are few.
    """
    step = max(16, resolution // 16 // 16 * 16)
    long = range(resolution, 2 * resolution + 1, step)
    wide = [(side, max(16, round(resolution**2 / side / 16) * 16)) for side in long]
    return [*wide, *((height, width) for width, height in wide[1:])]
