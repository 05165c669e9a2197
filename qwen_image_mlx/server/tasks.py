"""From the fields of a request to its result: what a job of each task does, as the command line does it.

What can be wrong without the model is found when work is made, in the thread that took the request; the work itself
runs in the worker's thread.
"""

from __future__ import annotations

import base64
import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from PIL.Image import new as new_image

from ..errors import RequestError
from ..files import temporary_folder
from ..images.files import encode_png
from ..images.sources import open_image, open_mask, open_rgba
from ..layers.folder import LAYER_FILE, folder_files
from ..layers.formats import FORMATS, check_formats
from ..layers.stack import Layer, LayerStack, composite
from ..options import ImageFile, Option, Several
from ..pipeline.conductor import decompose, generate
from ..pipeline.request import build_request, parsed_size
from ..runtime.options import of_task, recorded
from ..runtime.preview import Preview
from ..runtime.session import Session, layers_of
from ..variants import ASPECT_SIZES, LAYERED_RESOLUTIONS
from .images import data_url, decoded

if TYPE_CHECKING:
    from ..pipeline.progress import ProgressCallback
    from ..pipeline.request import Request
    from .jobs import Feed, Work
    from .models import Models
    from .schema import CaptionBody, ComposeBody, DecomposeBody, EditBody, GenerateBody

_BETWEEN_PREVIEWS = 0.25  # seconds
_COMPOSED_PIXELS = 1 << 26  # of all layers, scaled


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        pixels: of an image that is generated. A result may be larger, as large as an image that was sent, which
            `images.MAX_PIXELS` bounds.
        steps: of denoising.
    """

    pixels: int = 1 << 22
    steps: int = 100

    def check(self, request: Request) -> None:
        """Raises RequestError for a request beyond them."""
        self.check_steps(request.parameters.num_inference_steps)
        self.check_size(request.parameters.width, request.parameters.height)

    def check_steps(self, steps: int) -> None:
        """Raises RequestError for too many."""
        if steps > self.steps:
            raise RequestError(f"{steps} steps are asked for; this server takes {self.steps}")

    def check_size(self, width: int, height: int) -> None:
        """Raises RequestError for an image too large to be generated."""
        if width * height > self.pixels:
            raise RequestError(f"{width}x{height} are {width * height:,} pixels; this server generates {self.pixels:,}")


class Tasks:
    """What can be done for a request.

    Args:
        models: which model does what.
        defaults: by task and field, what the configuration says where a request says nothing.
        limits: what a request may ask for.
    """

    def __init__(self, models: Models, defaults: Mapping[str, Mapping[str, Any]], limits: Limits):
        self._models = models
        self._defaults = defaults
        self._limits = limits

    def work(self, task: str, body: Any) -> Work:
        """The work that a body asks for; raises RequestError for what is wrong with it already."""
        make: dict[str, Callable[[Any], Work]] = {
            "generate": self._generate,
            "edit": self._edit,
            "decompose": self._decompose,
            "caption": self._caption,
        }
        return self._told(make[task](body))

    def load(self, task: str) -> Work:
        """The work that fetches a task's model, and loads what stays in memory beside a usual request's work."""

        def work(feed: Feed) -> dict[str, Any]:
            self._models.load(task, self._usual(task, self._models.open(task)))
            return {"task": task, "model": self._models.name(task), "loaded": self._models.is_loaded(task)}

        return self._told(work)

    def _told(self, work: Work) -> Work:
        def told(feed: Feed) -> Any:
            with self._models.telling(feed):
                return work(feed)

        return told

    def _usual(self, task: str, session: Session) -> Request:
        """What is asked of a task's model by a request that says nothing."""
        wanted = self._wanted(task) | {"prompt": "an image"}
        image = new_image("RGBA" if session.shows_alpha else "RGB", (1024, 1024))
        images = [image] if task != "generate" else []
        return session.request(wanted, None if images else self._aspect, images, task=task)

    @property
    def _aspect(self) -> str:
        return self._defaults["generate"].get("aspect", next(iter(ASPECT_SIZES)))

    def _generate(self, body: GenerateBody) -> Work:
        for row in of_task("generate"):
            if "images" in row.needs and getattr(body, row.name) is not None and body.image is None:
                raise RequestError(f"{row.name} needs an image to be started from")
        if (body.width is None) != (body.height is None):
            raise RequestError("give both width and height, or an aspect")
        if body.width and body.aspect:
            raise RequestError("give width and height or an aspect, not both")
        size: Any = (body.width, body.height) if body.width else body.aspect
        if size is None and body.image is None:
            size = self._aspect
        return self._make_images("generate", body, [body.image] if body.image else [], size)

    def _edit(self, body: EditBody) -> Work:
        if (body.image is None) == (body.images is None):
            raise RequestError("give the images to edit, as images or one image")
        for row in of_task("edit"):
            if "mask" in row.of("edit").needs and getattr(body, row.name) is not None and body.mask is None:
                raise RequestError(f"{row.name} needs a mask")
        files = body.images or [body.image]
        return self._make_images("edit", body, files, None if body.size is None else parsed_size(body.size))

    def _make_images(self, task: str, body: Any, files: list[bytes], size: Any) -> Work:
        wanted = self._wanted(task, body)
        asked = [row for row in recorded("asked") if task in row.tasks and not _is_image(row)]
        said = {row.name: value for row in asked if (value := getattr(body, row.name)) != row.default}
        build_request(wanted | said, size if isinstance(size, tuple) else ASPECT_SIZES["1:1"])
        self._check_early(task, wanted, size)
        if files:
            decoded([*files, *([body.mask] if body.mask else [])])
            if size is not None:
                said["size"] = size if isinstance(size, str) else "x".join(map(str, size))

        def work(feed: Feed) -> dict[str, Any]:
            sources = decoded([*files, *([body.mask] if body.mask else [])])
            mask = open_mask(sources.pop()) if body.mask else None
            straight = [open_rgba(source) for source in sources] if said.get("keep_alpha") else None
            session = self._models.open(task)
            opened = [(open_rgba if session.shows_alpha else open_image)(source) for source in sources]
            request = session.request(wanted | said, size, opened, mask, straight, task=task)
            images = []
            with self._ready(task, session, request, feed) as (progress, cache, residency):
                for generated in generate(session.pipeline, request, progress, cache, **residency.releases):
                    metadata = {**generated.metadata, **said}
                    url = data_url(encode_png(generated.image, metadata))
                    index = metadata["image_index"]
                    images.append({"image": url, "seed": metadata["seed"], "index": index, "metadata": metadata})
            return {"images": images}

        return work

    def _decompose(self, body: DecomposeBody) -> Work:
        wanted = self._wanted("decompose", body)
        (image,) = decoded([body.image])
        known = self._models.facts("decompose").get("resolutions")
        draft = layers_of(open_rgba(image), wanted, known or [wanted.get("resolution", LAYERED_RESOLUTIONS[0])])
        self._check_early("decompose", wanted, draft.canvas.size if known else None)

        def work(feed: Feed) -> dict[str, Any]:
            (image,) = decoded([body.image])
            session = self._models.open("decompose")
            request = session.request(wanted, images=[open_rgba(image)])
            with self._ready("decompose", session, request, feed) as (progress, cache, residency):
                result = decompose(session.pipeline, request, progress, cache, **residency.releases)
            pngs = [data for name, data in folder_files(result.stack) if LAYER_FILE.fullmatch(name)]
            psnr = result.psnr
            return {
                "layers": [{"layer": number, "image": data_url(png)} for number, png in enumerate(pngs)],
                "prompt": result.prompt,
                "psnr": round(psnr, 2) if math.isfinite(psnr) else None,
                "seed": wanted["seed"][0],
            }

        return work

    def _caption(self, body: CaptionBody) -> Work:
        decoded([body.image])

        def work(feed: Feed) -> dict[str, Any]:
            (image,) = decoded([body.image])
            session = self._models.open("decompose")
            if not session.pipeline.variant.captions:
                raise RequestError(f"{self._models.name('decompose')} writes no captions")
            wanted = {**self._wanted("decompose"), "prompt": "", "resolution": body.resolution}
            request = session.request(wanted, images=[open_rgba(image)])  # which would begin with this caption
            self._limits.check_size(*request.canvas.size)
            with self._models.planned("decompose", request):
                caption = session.pipeline.caption_image(
                    request.images[0], language=body.language, resolution=math.isqrt(request.reference_pixels),
                    seed=body.seed, progress=feed,
                )  # fmt: skip
            return {"caption": caption}

        return work

    def _wanted(self, task: str, body: Any = None) -> dict[str, Any]:
        """What is asked for, by the names of the command line's flags; a seed is drawn where none is given."""
        names = [row.name for row in of_task(task) if not _is_image(row)]
        given = {name: value for name in names if (value := getattr(body, name, None)) is not None}
        wanted = {**{name: value for name, value in self._defaults[task].items() if name in names}, **given}
        seed = wanted.get("seed")
        return wanted | {"seed": [secrets.randbelow(2**32) if seed is None else seed]}

    def _check_early(self, task: str, wanted: Mapping[str, Any], size: Any) -> None:
        """The limits as far as they can be checked with what is known of a model that is not open."""
        facts = self._models.facts(task)
        steps = wanted.get("steps", facts.get("steps"))
        if steps is not None:
            self._limits.check_steps(steps)
        size = facts.get("sizes", {}).get(size) if isinstance(size, str) else size
        if size is not None:
            self._limits.check_size(*size)

    @contextmanager
    def _ready(self, task: str, session: Session, request: Request, feed: Feed) -> Any:
        """(progress callback, cache, residency) for a request that is within the limits."""
        self._limits.check(request)
        feed.images = len(request.seeds) * len(request.image_indices)
        with self._models.planned(task, request) as plan:
            progress: ProgressCallback = feed
            if feed.followed and session.pipeline.variant.preview:
                progress = Preview(_Previews(feed), feed, session.pipeline, request)
            yield progress, self._models.encodings, plan.residency


def _is_image(row: Option) -> bool:
    """Whether an option is one image, or several."""
    return isinstance(row.kind, ImageFile) or (isinstance(row.kind, Several) and isinstance(row.kind.kind, ImageFile))


class _Previews:
    """Shows images on a feed, a few each second."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self._shown = -math.inf

    def __call__(self, image: Image, step: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _BETWEEN_PREVIEWS:
            self._shown = now
            self._feed.show(data_url(encode_png(image)))


def compose(body: ComposeBody) -> dict[str, Any]:
    """Lays layers together; needs no model.

    Raises:
        RequestError: an image cannot be read, they are too large, or a format's library is missing.
    """
    check_formats([body.format])
    images = [open_rgba(image) for image in decoded([layer.image for layer in body.layers])]
    scaled = zip(images, body.layers, strict=True)
    pixels = sum(int(image.width * image.height * max(1.0, layer.scale) ** 2) for image, layer in scaled)
    if pixels > _COMPOSED_PIXELS:
        raise RequestError(f"the layers have {pixels:,} pixels together; at most {_COMPOSED_PIXELS:,} are taken")
    layers = tuple(
        Layer(image, layer.name or f"layer {number}", (layer.x, layer.y), layer.visible, layer.opacity)
        for number, (image, layer) in enumerate(zip(images, body.layers, strict=True))
    )
    size = max(image.width for image in images), max(image.height for image in images)
    stack = LayerStack(size, layers)
    for number, layer in enumerate(body.layers):
        stack = stack.scale(number, layer.scale)
    if body.format == "png":
        return {"image": data_url(encode_png(composite(stack)))}
    chosen = FORMATS[body.format]
    with temporary_folder() as folder:
        file = folder / chosen.file
        chosen.write(stack, file)
        data = base64.b64encode(file.read_bytes()).decode()
    return {"file": f"data:application/octet-stream;base64,{data}", "name": chosen.file}
