"""Many images with `generate`: --prompts-file and --seeds, and the way from them to a folder of images."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RequestError
from ..options import options_of
from ..pipeline.parameters import MAX_IMAGES, check_num_images, check_seed
from ..pipeline.presets import yielding
from ..pipeline.request import Request, build_request
from ..runtime.options import OpenOptions
from ..runtime.ranks import current, leads
from ..variants import ASPECT_SIZES
from .config import config_options
from .flags import FOLDER, rows, rows_of
from .idle import warn_idle
from .output import check_output
from .words import RANDOM, fill_placeholders, read_prompt

if TYPE_CHECKING:
    from ..pipeline.pipeline import QwenImagePipeline
    from ..runtime.batch import BatchImage

logger: logging.Logger = logging.getLogger(__name__)

SHEET = "contact-sheet.png"
_MAX_BYTES = 64_000_000
_KEYS = [row.name for row in rows().values() if row.line]


def is_batch(arguments: argparse.Namespace) -> bool:
    """Whether the flags ask for many images in a folder."""
    return arguments.prompts_file is not None or arguments.seeds is not None


def run_batch(arguments: argparse.Namespace, default_model: str) -> None:
    """Generates and saves every image that is missing from the folder; all options are checked first."""
    from ..files import named_path
    from ..images.files import save_png

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for row in rows_of("generate"):
        if row.name in given and (row.name in ("images", "from_image", "pick") or {"images", "mask"} & {*row.needs}):
            raise RequestError(f"{row.flag} applies to one image: it cannot be combined with --prompts-file or --seeds")
    if ("prompt" in given) == ("prompts_file" in given):
        raise RequestError("give one source of prompts: PROMPT or --prompts-file")
    read_prompt(given)
    if RANDOM in given.get("seed", ()):
        raise RequestError("--seed is -1, a random one, which a second run would not find again; give --seeds 1-4")
    fill_placeholders(given.get("output"))
    if "seeds" in given:
        if "seed" in given:
            raise RequestError("give --seed or --seeds, not both")
        given["seed"] = _seeds(given["seeds"])
    usual = {"seed": 0, **config_options(arguments, "generate")}
    path = named_path(given["prompts_file"], "--prompts-file") if "prompts_file" in given else None
    # The flags' own faults are at no line.
    _draft(_merge_options(_Line("", {"prompt": given.get("prompt", "")}), usual, given))
    merged = [_merge_options(line, usual, given) for line in ([_Line("", {})] if path is None else _lines(path))]
    drafts = [_draft(one) for one in merged]
    count = sum(len(draft.seeds) * len(draft.image_indices) for draft in drafts)
    if count > MAX_IMAGES:
        raise RequestError(f"these are {count:,} images; at most {MAX_IMAGES:,} work")
    folder = _folder(given.get("output"))
    check_output(folder / "image.png", max(3 * d.parameters.width * d.parameters.height for d in drafts))

    from ..files import sweep_results
    from ..runtime.batch import batch_images, generate_all, missing_images
    from ..runtime.session import Session
    from .console import Console
    from .preview import preview_file

    with Console(arguments) as console, ExitStack() as stack:
        timings = console.timings("timings" in given)
        session = Session.open({**usual, **given}, default_model, timings or console, task="generate")
        requests = []
        for one in merged:
            with _at(one.place):
                requests.append(session.request(one.options, one.size))
        warn_idle("generate", given, requests[0])
        recorded = {row.name for row in options_of(OpenOptions) if row.record == "given"}
        provenance = {name: value for name, value in given.items() if name in recorded}
        images = batch_images(session.pipeline, requests, folder, provenance)
        missing = missing_images(images, current())
        if len(missing) < len(images):
            logger.info("%d of %d images are in %s already", len(images) - len(missing), len(images), folder)
        if not missing:
            if leads():
                sweep_results(folder)
                if "contact_sheet" in given:
                    console.result(_save_sheet(images, folder))
            return
        shared = {**usual, **given}.get("controls")
        places = ["" if one.options.get("controls") is shared else one.place for one in merged]
        _check_controls(session.pipeline, zip(places, requests, strict=True), missing)
        show = stack.enter_context(preview_file(folder / "qwen-image.png")) if "preview" in given else None
        for one, generated in generate_all(session, missing, show):
            metadata = {**generated.metadata, **provenance}
            written = save_png(generated.image, one.path, metadata)
            console.result(written, seed=metadata["seed"], index=metadata["image_index"], metadata=metadata)
        if "contact_sheet" in given and leads():
            console.result(_save_sheet(images, folder))
        if timings:
            console.close()
            logger.info("%s", timings.table())


def _save_sheet(images: Sequence[BatchImage], folder: Path) -> Path:
    """Writes the contact sheet of a batch, with the records of its images, in the place of an earlier one of them."""
    from ..files import replace_file
    from ..images.files import encode_png, read_metadata, save_png
    from ..images.sheet import MAX_IMAGES as MOST
    from ..images.sheet import RECORDS, contact_sheet, records_of, thumbnail
    from ..images.sources import open_rgba
    from ..runtime.batch import finished_file

    files = [file for one in images[:MOST] if (file := finished_file(one)) is not None]
    records = [read_metadata(file) for file in files]
    prompts = {record.get("prompt") for record in records}
    labels = [
        f"seed {record.get('seed')}" + (f"  {record.get('prompt')!s:.24}" if len(prompts) > 1 else "")
        for record in records
    ]
    sheet = contact_sheet([thumbnail(open_rgba(file)) for file in files], labels)
    if len(images) > MOST:
        logger.warning("the contact sheet shows the first %d of %d images", MOST, len(images))
    path = folder / SHEET
    try:
        its_own = all(record in records for record in records_of(read_metadata(path), SHEET))
    except RequestError:  # it does not exist, or is something else
        its_own = False
    if not its_own:
        return save_png(sheet, path, {RECORDS: records})
    replace_file(path, encode_png(sheet, {RECORDS: records}))
    return path


# Options of each line -------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """The options of one line keyed by flag name, the line's place in the file, and the size of the image."""

    place: str
    options: dict[str, Any]
    size: tuple[int, int] | str = ""


def _merge_options(line: _Line, usual: Mapping[str, Any], given: Mapping[str, Any]) -> _Line:
    """A line with all its options: its own keys override the flags, which override the defaults."""
    options = line.options
    with _at(line.place):
        for name in ("prompt", "negative_prompt"):
            _check_text(name, options.get(name, ""))
        if "seed" in options:
            if options["seed"] == RANDOM:
                raise RequestError("seed is -1, a random one, which a second run would not find again; give a number")
            check_seed(options["seed"])
        merged = yielding({**usual, **given}, options) | options
        check_num_images(merged.get("num_images", 1))
        sized = options if options.keys() & {"width", "height", "aspect"} else given
        size = _size(sized) or usual.get("aspect") or next(iter(ASPECT_SIZES))
    return _Line(line.place, merged, size)


def _draft(one: _Line) -> Request:
    """The request, as far as it is known without the model."""
    with _at(one.place):
        return build_request(one.options, ASPECT_SIZES[one.size] if isinstance(one.size, str) else one.size)


def _check_controls(
    pipeline: QwenImagePipeline, requests: Iterable[tuple[str, Request]], missing: Sequence[BatchImage]
) -> None:
    """Opens the controls of all missing images before any is generated; faults have the place of the control.

    Args:
        pipeline: the opened checkpoint.
        requests: each after the place of its controls in the file; "" for those of the flags.
        missing: the images that will be generated.
    """
    left = {one.request.controls for one in missing}
    for place, request in requests:
        if request.controls in left:
            left.remove(request.controls)
            with _at(place):
                pipeline.open_controls(request.steering)


def _size(options: Mapping[str, Any]) -> tuple[int, int] | str | None:
    """(width, height), an aspect, or None."""
    if ("width" in options) != ("height" in options):
        raise RequestError("give both width and height, or aspect")
    if "width" in options and "aspect" in options:
        raise RequestError("give one size only: width and height, or aspect")
    aspect = options.get("aspect")
    if aspect is not None and aspect not in tuple(ASPECT_SIZES):
        raise RequestError(f"aspect is {aspect!r:.80}, but must be one of {', '.join(ASPECT_SIZES)}")
    return (options["width"], options["height"]) if "width" in options else aspect


def _seeds(text: str) -> list[int]:
    """The seeds of 1-20 or 1,5,9-12, in this order; raises RequestError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        if not match or len(part) > 60:
            raise RequestError(f"--seeds is {text!r:.80}, but must be like 1-20 or 1,5,9-12")
        first = int(match[1])
        last = check_seed(first if match[2] is None else int(match[2]))
        if last < first:
            raise RequestError(f"--seeds has {part.strip()}, which runs backwards; write {last}-{first}")
        if len(found) + last - first >= MAX_IMAGES:
            raise RequestError(f"--seeds has more than {MAX_IMAGES:,} seeds, which is as many images as work")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def _folder(output: str | None) -> Path:
    from ..files import named_path

    folder = named_path(FOLDER if output is None else output, "--output")
    if folder.suffix.lower() == ".png" or (folder.exists() and not folder.is_dir()):
        raise RequestError(f"--output is {output}, but many images need a folder")
    return folder


# The file of prompts --------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[_Line]:
    """Each prompt of a file with its options; raises RequestError."""
    readers = {".txt": _text_line, ".jsonl": _json_line}
    if path.suffix.lower() not in readers:
        raise RequestError(f"--prompts-file is {path}, but its name must end in {' or '.join(readers)}")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe may never end, nor begin
            raise ValueError("it is not a regular file")
        if size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES // 10**6} MB, which is too much for prompts")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not text in UTF-8") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"--prompts-file is {path}, which cannot be read: {why}") from error
    found = 0
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        with _at(place):
            options = readers[path.suffix.lower()](line.strip())
        if options is not None:
            found += 1
            yield _Line(place, options)
    if not found:
        raise RequestError(f"{path} holds no prompts")


def _text_line(line: str) -> dict[str, Any] | None:
    return None if not line or line.startswith("#") else {"prompt": line}


def _json_line(line: str) -> dict[str, Any] | None:
    if not line:
        return None
    try:
        options = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise RequestError(f"this is not JSON: {why}") from error
    if not isinstance(options, dict):
        raise RequestError('this is not a JSON object, such as {"prompt": "a fox"}')
    for name in options:
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_KEYS)}"
            raise RequestError(f"{name!r:.80} is not a key: {hint}")
    options = {name: value for name, value in options.items() if value is not None}
    if "prompt" not in options:
        raise RequestError("the prompt is missing")
    return options


def _check_text(name: str, value: Any) -> None:
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise RequestError(f"{name} is {value!r:.80}, but must be a text") from error


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Adds the place in the file to a RequestError."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{place}: {error}" if place else str(error)) from error
