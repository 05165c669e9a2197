"""Finds and checks training examples, in a folder of images with captions or a manifest, before any work.

Independent of models: files in, `Example`s out.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, some
from ..files import named_path, reason
from ..images.formats import OTHER_SUFFIXES, SUFFIXES, unread_suffixes
from ..outside import MAX_CHARACTERS, why_not_read
from .settings import is_text

logger: logging.Logger = logging.getLogger(__name__)

MANIFESTS = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".txt", ".caption")  # endings of files that hold a caption
# The keys of a manifest's lines, by task: the image to learn, the images it is generated from, and the caption. The
# first spelling is ours; the others are those of Hugging Face's imagefolder and of its datasets of edits.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "t2i": (("image", "file_name"), (), ("caption", "text", "prompt")),
    "edit": (
        ("target", "file_name", "edited_image", "output_image"), ("source", "input_image", "original_image"),
        ("instruction", "edit_prompt", "caption", "text", "prompt"),
    ),
    "layered": (("image", "file_name"), ("layers",), ("caption", "text", "prompt")),
}  # fmt: skip
_MAX_BYTES = 64_000_000  # of a manifest or a caption
_FIELDS = {"edit": "sources", "layered": "layers"}
_REPEATED = re.compile(r"([0-9]{1,3})_.")  # a folder's name in kohya's layout: repeats of each image


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        caption: of the image, or the instruction of an edit.
        image: the image to learn; for a layered model the one to decompose.
        sources: the reference images of an edit.
        layers: the layers of the image, back to front.
    """

    caption: str
    image: Path
    sources: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of its images."""
        return self.image, *self.sources, *self.layers


def read_examples(data: str | Path, task: str) -> list[Example]:
    """The examples of a folder, or of a manifest.

    A folder holds a `metadata.jsonl` or `metadata.csv`, or, for text to image, images with captions in `.txt` or
    `.caption` files of the same names. Its subfolders `N_NAME` (kohya's layout) are read as well, each image N times.
    Skipped files are named in a warning, except for hidden ones.

    Args:
        data: a folder, a JSON-lines file or a CSV; the files it names are relative to its folder.
        task: "t2i" {"image", "caption"}, "edit" {"source", "target", "instruction"; a source may be a list} or
            "layered" {"image", "layers", "caption"}; Hugging Face's "file_name" and "text" are understood.

    Raises:
        RequestError: no example exists, or a file is missing, damaged or unreadable; the message names it.
    """
    path = named_path(data, "data")
    if not path.exists():
        raise RequestError(f"the data {str(data)!r} do not exist: give a folder of images with captions")
    if not path.is_dir() and not path.is_file():
        raise RequestError(f"the data {str(data)!r} are neither a folder nor a file")
    manifests = [path] if path.is_file() else [path / name for name in MANIFESTS if (path / name).is_file()]
    if len(manifests) > 1:
        raise RequestError(f"{path} has {' and '.join(MANIFESTS)}: give the one that counts as the data")
    if manifests:
        examples = _from_manifest(manifests[0], task)
    elif task != "t2i":
        keys = ", ".join(spellings[0] for spellings in _KEYS[task])
        raise RequestError(f"{path} has no {MANIFESTS[0]}; training {task} needs one, with {keys} in each line")
    else:
        examples = _from_folder(path)
    if not examples:
        raise RequestError(f"{path} holds nothing to train on: {_elsewhere(path)}")
    if missing := [file for example in examples for file in example.files if not os.path.isfile(file)]:
        raise RequestError(f"{len(missing)} images are missing: {some(f'{file!s:.300}' for file in missing)}")
    if long := [example.image for example in examples if len(example.caption) > MAX_CHARACTERS]:
        raise RequestError(f"{len(long)} captions have more than {MAX_CHARACTERS:,} characters: {some(long)}")
    if silent := [example.image for example in examples if not example.caption.strip()]:
        raise RequestError(f"{len(silent)} of {len(examples)} captions are missing or empty: {some(silent)}")
    if manifests and path.is_dir():
        named = {file.resolve() for example in examples for file in example.files}
        _warn("are not in its manifest", [file for file in _all_images(path) if file.resolve() not in named], path)
    kinds = Counter(file.suffix.lower() for example in examples for file in example.files)
    logger.info("%s: %s images", path, ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    return examples


def _elsewhere(path: Path) -> str:
    """The cure for a folder without examples."""
    folders = [path / name for name in ("train", "data", "images", "img")] if path.is_dir() else []
    for folder in [*folders, *(_folders(path) if path.is_dir() else [])]:
        if folder.is_dir() and (_images(folder) or any((folder / name).is_file() for name in MANIFESTS)):
            return f"give {folder}, which does"
    return "put images and their captions into it"


def _list(folder: Path) -> list[Path]:
    """The entries of a folder, by name, without hidden ones; macOS adds a `._NAME` to files on other disks."""
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {reason(error)}") from error


def _images(folder: Path) -> list[Path]:
    return [file for file in _list(folder) if file.suffix.lower() in SUFFIXES and file.is_file()]


def _all_images(folder: Path) -> list[Path]:
    """The images of a folder and of all folders in it, whether their formats are read or not."""
    found = []
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        found += [file for file in files if file.suffix.lower() in SUFFIXES | OTHER_SUFFIXES]
    return found


def _folders(folder: Path) -> list[Path]:
    return [file for file in _list(folder) if file.is_dir()]


def _warn(why: str, files: Sequence[Path], folder: Path) -> None:
    """Names files that are left out."""
    if files:
        names = some(str(file.relative_to(folder)) for file in files)
        logger.warning("%d files in %s %s and are left out: %s", len(files), folder, why, names)


def _from_folder(folder: Path) -> list[Example]:
    """The examples of a folder and of its subfolders named with a number of repeats."""
    examples = _captioned_examples(folder)
    for inside in _folders(folder):
        if counted := _REPEATED.match(inside.name):
            found = _captioned_examples(inside)
            examples += found * int(counted[1])
            logger.warning("%s: %d images, each counted %d times", inside.name, len(found), int(counted[1]))
    taken = {example.image for example in examples}
    others = [file for file in _all_images(folder) if file not in taken]
    _warn("are in a folder without a number of repeats before its name (10_fox)", others, folder)
    return examples


def _captioned_examples(folder: Path) -> list[Example]:
    """The images in a folder, with their captions."""
    files = [file for file in _list(folder) if file.is_file()]
    unread = unread_suffixes()
    if unreadable := [file.name for file in files if file.suffix.lower() in unread]:
        raise RequestError(
            f"{len(unreadable)} files in {folder} have formats that are not read: {some(unreadable)}; convert them "
            "to JPEG (on a Mac `sips -s format jpeg PHOTO.heic --out PHOTO.jpg`; pip install pillow-heif for HEIC), or "
            "move them away"
        )
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    stems = [file.stem for file in images]
    if twice := [file.name for file in images if stems.count(file.stem) > 1]:
        raise RequestError(f"images share a caption, because only their endings differ: {some(twice)}")
    captions = {file: [c for c in map(file.with_suffix, CAPTIONS) if os.path.isfile(c)] for file in images}
    if missing := [file.name for file, found in captions.items() if not found]:
        raise RequestError(
            f"{len(missing)} of {len(images)} images in {folder} have no caption in a .txt file of the same name: "
            f"{some(missing)}"
        )
    if several := [file.name for file, found in captions.items() if len({_read(c).strip() for c in found}) > 1]:
        raise RequestError(f"images have two captions, in .txt and .caption, that differ: {some(several)}")
    alone = [file for file in files if file.suffix.lower() in CAPTIONS and file.stem not in stems]
    _warn("have no image of the same name", alone, folder)
    return [Example(_read(found[0]).strip(), file) for file, found in captions.items()]


def _from_manifest(manifest: Path, task: str) -> list[Example]:
    if manifest.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(_read(manifest)), strict=True)
        try:
            return [_example(row, f"line {rows.line_num} of {manifest}", manifest.parent, task) for row in rows]
        except csv.Error as error:
            raise RequestError(f"line {rows.line_num} of {manifest} is not CSV ({error}): correct it") from error
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

    def value(spellings: tuple[str, ...]) -> Any:
        return next((row[key] for key in spellings if row.get(key) is not None), None)

    def files(spellings: tuple[str, ...], several: bool) -> tuple[Path, ...]:
        found = value(spellings)
        names = found if several and isinstance(found, list) else [found]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise RequestError(f"{where} has no {_spell(spellings)}, or it is not the name of an image: correct it")
        return tuple(folder / name for name in names)

    caption = "" if (found := value(words)) is None else found
    if not isinstance(caption, str) or not is_text(caption):
        raise RequestError(f"{where} has no {_spell(words)}, or no text in it: correct it")
    beside = {_FIELDS[task]: files(others, several=True)} if others else {}
    return Example(caption.strip(), files(image, several=False)[0], **beside)


def _spell(spellings: tuple[str, ...]) -> str:
    first, *more = spellings
    return f"{first} ({', '.join(more)})" if more else first


def _read(path: Path) -> str:
    try:
        if why := why_not_read(path, _MAX_BYTES):
            raise RequestError(f"{path} cannot be read as text: {why}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text: {error}") from error


def bucket_of(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (width, height) whose aspect is nearest to that of a size."""
    aspect = size[0] / size[1]
    return min(buckets, key=lambda bucket: max(aspect, r := bucket[0] / bucket[1]) / min(aspect, r))


def buckets_of(resolution: int, multiple: int = 16) -> list[tuple[int, int]]:
    """Sizes (width, height) of about resolution² pixels, up to an aspect of 4:1, for batches to fill.

    Both sides are multiples of `multiple`, of which the resolution is one. The longer sides are a sixteenth of the
    resolution apart, so that there are few.
    """
    step = max(multiple, resolution // 16 // multiple * multiple)
    long = range(resolution, 2 * resolution + 1, step)
    wide = [(side, max(multiple, round(resolution**2 / side / multiple) * multiple)) for side in long]
    return [*wide, *((height, width) for width, height in wide[1:])]
