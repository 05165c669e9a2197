"""Generates many images from text with every component loaded once: first all encodings, then all images.

Encodings wait on disk in between, so that a thousand prompts take the memory of one. An image has a file name that
follows from its options, and its PNG has the options on record; so a run knows which images an earlier one finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..files import temporary_folder
from ..images.files import read_metadata
from ..pipeline.advice import advise
from ..pipeline.conditioning import GuidanceEncoding
from ..pipeline.conductor import GeneratedImage, encode_controls, generate_encoded
from ..pipeline.metadata import describe
from ..pipeline.request import slug
from ..sampling.solvers import SOLVERS
from .ranks import Ranks
from .session import Session

if TYPE_CHECKING:
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.request import Request
    from .preview import Show


@dataclass(frozen=True)
class BatchImage:
    """One image of many.

    Attributes:
        request: for this image alone.
        facts: its PNG's record of how it is generated, JSON-like, without the package's version.
        path: its file.
    """

    request: Request
    facts: dict[str, Any]
    path: Path

    def is_in(self, path: Path) -> bool:
        """Whether a file is a complete PNG with the record of this image."""
        try:
            record = read_metadata(path)
        except RequestError:
            return False
        return all(name in record and record[name] == value for name, value in self.facts.items())


def batch_images(
    pipeline: QwenImagePipeline, requests: Sequence[Request], folder: Path, provenance: Mapping[str, Any] = {}
) -> list[BatchImage]:
    """Every image of requests that generate from text, without duplicates; nothing is loaded.

    Args:
        pipeline: the opened checkpoint.
        requests: the requests, each for one or more images.
        folder: for the images.
        provenance: what the caller adds to each image's metadata.
    """
    found = {}
    for whole in requests:
        for seed, index in product(whole.seeds, whole.image_indices):
            request = replace(whole, seeds=(seed,), image_indices=range(index, index + 1))
            facts = describe(pipeline, request, None, seed, index) | provenance
            del facts["version"]
            text = json.dumps(facts)
            name = f"{slug(request.prompt)}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"
            found.setdefault(text, BatchImage(request, json.loads(text), folder / name))
    return list(found.values())


def finished_file(one: BatchImage) -> Path | None:
    """The finished file of an image, under its own name or a numbered one; None if there is none."""
    files = [one.path, *sorted(one.path.parent.glob(f"{one.path.stem}-*.png"))]
    return next((file for file in files if file.is_file() and one.is_in(file)), None)


def missing_images(images: Sequence[BatchImage], ranks: Ranks | None = None) -> list[BatchImage]:
    """The images without a finished file, under their own name or under a numbered one that `save_png` chose.

    Args:
        images: from `batch_images`.
        ranks: of this run, which must ask for the same; rank 0's files count. None is a single process.

    Raises:
        RankError: the ranks ask for different images.
    """
    ranks = ranks or Ranks()
    ranks.agree({"the images": hashlib.sha256(repr([one.facts for one in images]).encode()).hexdigest()[:12]})
    return [images[number] for number in ranks.led(lambda: _missing(images))]


def _missing(images: Sequence[BatchImage]) -> list[int]:
    """The numbers of the images without a finished file."""
    there: dict[tuple[Path, str], list[Path]] = {}
    for folder in {one.path.parent for one in images}:
        for file in sorted(folder.glob("*.png")):
            for stem in {file.stem, re.sub(r"-\d+$", "", file.stem)}:
                there.setdefault((folder, stem), []).append(file)
    return [
        number
        for number, one in enumerate(images)
        if not any(map(one.is_in, there.get((one.path.parent, one.path.stem), ())))
    ]


def heaviest(images: Sequence[BatchImage]) -> Request:
    """A request that takes at least the memory of each of these: the largest size, the longest schedule, all images."""
    requests = [one.request for one in images]
    largest = max(requests, key=lambda request: request.parameters.width * request.parameters.height)
    return replace(
        largest,
        negative_prompt=next((r.guiding_prompt for r in requests if r.guiding_prompt is not None), None),
        parameters=replace(
            largest.parameters,
            num_inference_steps=max(request.parameters.num_inference_steps for request in requests),
            cfg_scale=max(request.parameters.cfg_scale for request in requests),
            solver=max((request.parameters.solver for request in requests), key=lambda name: SOLVERS[name].count(50)),
            step_cache=max(
                (r.parameters.step_cache for r in requests if r.parameters.step_cache), key=_size, default=None
            ),
            sigmas=None,
        ),
        image_indices=range(len(images)),
        controls=max((request.controls for request in requests), key=len),
    )


def _size(step_cache: str) -> tuple[int, bool, int]:
    """The order of step caches: by the blocks that run before they decide, and by the memory of what they keep."""
    from ..sampling.step_caches import method_of  # here: most runs have no step cache

    method = method_of(step_cache)
    return method.first, method.reuses == "residual", method.kept(2)


def generate_all(
    session: Session, images: Sequence[BatchImage], show: Show | None = None
) -> Iterator[tuple[BatchImage, GeneratedImage]]:
    """Plans for the heaviest image, then yields the images; those with equal schedules share one modulation table.

    Args:
        session: of the opened checkpoint; if its cache has all encodings, no encoder is loaded.
        images: from `batch_images`, at least one.
        show: called with a preview after each step.

    Raises:
        RequestError: as `Session.plan`.
    """
    pipeline = session.pipeline
    rest = len(images) == 1 and session.parallel == "images"  # all that is left of a batch
    with session.plan(heaviest(images), "auto" if rest else None) as plan, temporary_folder() as folder:
        if not session.works:
            session.attend()
            return
        advise((one.request for one in images), pipeline.variant)
        kept: dict[tuple[str, str | None], Path] = {}
        controls = {}
        for one in images:
            if (steered := _controls_key(one.request)) not in controls:
                controls[steered] = encode_controls(pipeline, one.request, session.progress)
            if _prompts(one.request) not in kept:
                path = folder / f"{len(kept)}.safetensors"
                session.encode(one.request).save(path)
                kept[_prompts(one.request)] = path
        staged = plan.residency.staged
        if staged:
            pipeline.release_encoders()
        together: dict[tuple[Any, ...], list[BatchImage]] = {}
        for one in images:
            together.setdefault(_schedule(one.request), []).append(one)
        ordered = [one for some in together.values() for one in some]
        for one in ordered:
            request, encoding = one.request, GuidanceEncoding.load(kept[_prompts(one.request)])
            last = staged and one is ordered[-1]
            generated = generate_encoded(
                pipeline, request, encoding, None, session.watch(request, show), last, controls[_controls_key(request)]
            )
            for image, seed, index in generated:
                yield one, GeneratedImage(image, describe(pipeline, request, encoding, seed, index))


def _prompts(request: Request) -> tuple[str, str | None]:
    """The part of a request that an encoding depends on, for one pipeline and images from text."""
    return request.prompt, request.guiding_prompt


def _controls_key(request: Request) -> str:
    """The part of a request that the encoding of its controls depends on."""
    record = [control.recorded() for control in request.controls]
    return json.dumps([record, request.parameters.width, request.parameters.height])


def _schedule(request: Request) -> tuple[Any, ...]:
    parameters = request.parameters
    return (
        parameters.width * parameters.height, parameters.num_inference_steps, parameters.sigmas, parameters.shift,
        parameters.solver,
        parameters.stretch,
    )  # fmt: skip
