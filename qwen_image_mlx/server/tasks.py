"""The work of each task: from a request's fields to its result, as on the command line.

Errors that can be found without the model are raised when the work is created, in the request's thread. The work itself
runs in the worker's thread.
"""

from __future__ import annotations

import base64
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from PIL.Image import new as new_image

from ..errors import RequestError
from ..files import temporary_folder
from ..images.control import control_image
from ..images.files import encode_png
from ..images.geometry import size_of_area
from ..images.sources import open_image, open_mask, open_rgba
from ..layers.folder import LAYER_FILE, folder_files
from ..layers.formats import FORMATS, check_formats
from ..layers.stack import Layer, LayerStack, composite
from ..options import ImageFile, Option, Several
from ..pipeline.presets import yielding
from ..pipeline.request import build_request, parse_size
from ..runtime.options import of_task, recorded
from ..runtime.preview import Preview
from ..runtime.session import Session, layers_draft
from ..variants import ASPECT_SIZES
from .images import data_url, decode

if TYPE_CHECKING:
    from ..pipeline.progress import ProgressCallback
    from ..pipeline.request import Request
    from ..runtime.memory_plan import MemoryPlan
    from .jobs import Feed, Work
    from .models import Models
    from .schema import CaptionBody, ComposeBody, ControlImageBody, DecomposeBody, EditBody, GenerateBody

_SHOWN_PIXELS = 512 * 512  # of a control image, shown
_BETWEEN_PREVIEWS = 0.25  # seconds
_MAX_COMPOSED_PIXELS = 1 << 26  # of all layers in total, after scaling


@dataclass(frozen=True)
class Limits:
    """The limits for requests.

    Attributes:
        pixels: maximum pixels of a generated image. A result with `size: source` can be larger: as large as the image
            in the request, which `images.MAX_PIXELS` limits.
        steps: maximum denoising steps.
    """

    pixels: int = 1 << 22
    steps: int = 100

    def check(self, request: Request) -> None:
        """Raises RequestError for a request beyond the limits."""
        self.check_steps(request.parameters.num_inference_steps)
        self.check_size(request.parameters.width, request.parameters.height)

    def check_steps(self, steps: int) -> None:
        """Raises RequestError for too many steps."""
        if steps > self.steps:
            raise RequestError(f"the request has {steps} steps; this server allows at most {self.steps}")

    def check_size(self, width: int, height: int) -> None:
        """Raises RequestError for too many pixels."""
        if width * height > self.pixels:
            raise RequestError(
                f"{width}x{height} are {width * height:,} pixels; this server allows at most {self.pixels:,}"
            )


class Tasks:
    """Creates the work of requests.

    Args:
        models: the models by task.
        defaults: by task and field, the configured default values.
        limits: the limits for requests.
        controlnets: the references of the ControlNets that requests may name, by name.
    """

    def __init__(
        self,
        models: Models,
        defaults: Mapping[str, Mapping[str, Any]],
        limits: Limits,
        controlnets: Mapping[str, str] = {},
    ):
        self._models = models
        self._controlnets = controlnets
        self._defaults = defaults
        self._limits = limits

    def work(self, task: str, body: Any) -> Work:
        """Creates the work of a request; raises RequestError for errors that can be found without the model."""
        make: dict[str, Callable[[Any], Work]] = {
            "generate": self._generate,
            "edit": self._edit,
            "decompose": self._decompose,
            "caption": self._caption,
        }
        return self._with_reports(make[task](body))

    def load(self, task: str) -> Work:
        """The work that downloads a task's model, and loads the parts that stay in memory during a typical request."""

        def work(feed: Feed) -> dict[str, Any]:
            self._models.load(task, self._typical_request(task, self._models.open(task)))
            return {"task": task, "model": self._models.name(task), "loaded": self._models.is_loaded(task)}

        return self._with_reports(work)

    def unload(self, task: str | None) -> Work:
        """The work that releases a task's model, or all models for None."""

        def work(feed: Feed) -> dict[str, Any]:
            self._models.unload(task)
            return {"models": self._models.status()}

        return work

    def with_seed(self, task: str, body: Any) -> Any:
        """A body with a seed: its own, the configured one, or a random one."""
        if getattr(body, "seed", 0) is not None:
            return body
        return body.model_copy(update={"seed": self._options(task)["seed"][0]})

    def _with_reports(self, work: Work) -> Work:
        def reporting_work(feed: Feed) -> Any:
            with self._models.reporting(feed):
                return work(feed)

        return reporting_work

    def _typical_request(self, task: str, session: Session) -> Request:
        """A request to a task's model with default values."""
        options = self._options(task) | {"prompt": "an image", "seed": [0]}
        image = new_image("RGBA" if session.shows_alpha else "RGB", (1024, 1024), "white")
        images = [image] if task != "generate" else []
        return session.request(options, None if images else self._aspect, images, task=task)

    @property
    def _aspect(self) -> str:
        return self._defaults["generate"].get("aspect", next(iter(ASPECT_SIZES)))

    def _generate(self, body: GenerateBody) -> Work:
        for row in of_task("generate"):
            if "images" in row.needs and getattr(body, row.name) is not None and body.image is None:
                raise RequestError(f"{row.name} needs an image to start from")
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
            if (
                "mask" in row.of("edit").needs
                and getattr(body, row.name) is not None
                and not (body.mask or body.outpaint)
            ):
                raise RequestError(f"{row.name} needs a mask")
        files = body.images or [body.image]
        return self._make_images("edit", body, files, None if body.size is None else parse_size(body.size))

    def _make_images(self, task: str, body: Any, files: list[bytes], size: Any) -> Work:
        options = self._options(task, body)
        rows = [row for row in recorded("given") if task in row.tasks and not _is_image(row)]
        recorded_options = {row.name: value for row in rows if (value := getattr(body, row.name)) != row.default}
        controls = self._controls(body)
        build_request(options | recorded_options | controls, size if isinstance(size, tuple) else ASPECT_SIZES["1:1"])
        self._check_early(task, options, size)
        if files:
            decode([*files, *([body.mask] if body.mask else [])])
            if size is not None:
                recorded_options["size"] = size if isinstance(size, str) else "x".join(map(str, size))

        def work(feed: Feed) -> dict[str, Any]:
            sources = decode([*files, *([body.mask] if body.mask else [])])
            mask = open_mask(sources.pop()) if body.mask else None
            straight = [open_rgba(source) for source in sources] if recorded_options.get("keep_alpha") else None
            session = self._models.open(task)
            opened = [(open_rgba if session.shows_alpha else open_image)(source) for source in sources]
            merged = options | recorded_options | self._controls(body)
            request = session.request(merged, size, opened, mask, straight, task=task)
            if body.outpaint and request.canvas is not None:
                self._limits.check_size(*request.canvas.result_size)
            images = []
            with self._prepare(task, session, request, feed) as (plan, progress):
                for generated in session.planned_images(request, plan, progress, self._models.encodings):
                    metadata = {**generated.metadata, **recorded_options}
                    url = data_url(encode_png(generated.image, metadata))
                    index = metadata["image_index"]
                    images.append({"image": url, "seed": metadata["seed"], "index": index, "metadata": metadata})
            return {"images": images}

        return work

    def _controls(self, body: Any) -> dict[str, Any]:
        """The option controls, its images decoded; {} without any. Only this server's ControlNets are opened."""
        made = []
        for control in body.controls or ():
            if control.controlnet not in self._controlnets:
                offered = ", ".join(self._controlnets) or "none, because it was started without --controlnet"
                raise RequestError(
                    f"{control.controlnet!r:.100} is not a ControlNet of this server, which has {offered}"
                )
            fields = {name: value for name, value in control if value is not None}
            files = [name for name in fields if isinstance(fields[name], bytes)]
            images = zip(files, decode([fields[name] for name in files]), strict=True)
            made.append({**fields, **dict(images), "controlnet": self._controlnets[control.controlnet]})
        return {"controls": made} if made else {}

    def _decompose(self, body: DecomposeBody) -> Work:
        options = self._options("decompose", body)
        (image,), masks = decode([body.image]), decode([body.layer_mask] if body.layer_mask else [])
        known = self._models.facts("decompose").get("resolutions")
        layer_mask = {"layer_mask": masks[0]} if masks else {}
        draft = layers_draft(open_rgba(image), options | layer_mask, known)
        self._check_early("decompose", options, draft.canvas.size if known else None)

        def work(feed: Feed) -> dict[str, Any]:
            (image,) = decode([body.image])
            session = self._models.open("decompose")
            request = session.request(options | layer_mask, images=[open_rgba(image)])
            with self._prepare("decompose", session, request, feed) as (plan, progress):
                result = session.planned_layers(request, plan, progress, self._models.encodings)
            if result is None:
                return {}
            pngs = [data for name, data in folder_files(result.stack) if LAYER_FILE.fullmatch(name)]
            psnr = result.psnr
            return {
                "layers": [{"layer": number, "image": data_url(png)} for number, png in enumerate(pngs)],
                "prompt": result.prompt,
                "psnr": round(psnr, 2) if math.isfinite(psnr) else None,
                "seed": options["seed"][0],
            }

        return work

    def _caption(self, body: CaptionBody) -> Work:
        decode([body.image])

        def work(feed: Feed) -> dict[str, Any]:
            (image,) = decode([body.image])
            session = self._models.open("decompose")
            if not session.pipeline.variant.captions:
                raise RequestError(f"{self._models.name('decompose')} writes no captions")
            options = self._options("decompose") | {"prompt": "", "resolution": body.resolution, "seed": [body.seed]}
            request = session.request(options, images=[open_rgba(image)])  # the task would begin with this caption
            self._limits.check_size(*request.canvas.size)
            # Guidance and images may not suit a caption; blocks that are shared stay so.
            parallel = None if session.parallel in ("layers", "none") else "auto"
            with self._models.plan("decompose", request, parallel):
                if not session.works:
                    return {}
                caption = session.pipeline.caption_image(
                    request.images[0], language=body.language, resolution=math.isqrt(request.reference_pixels),
                    seed=body.seed, progress=feed,
                )  # fmt: skip
            return {"caption": caption}

        return work

    def _options(self, task: str, body: Any = None) -> dict[str, Any]:
        """The options by flag name: the request's, then the configured defaults; a random seed if there is none."""
        names = [row.name for row in of_task(task) if not _is_image(row) and row.name != "controls"]
        values = {name: value for name in names if (value := getattr(body, name, None)) is not None}
        usual = {name: value for name, value in self._defaults[task].items() if name in names}
        options = yielding(usual, values) | values
        seed = options.get("seed")
        return options | {"seed": [secrets.randbelow(2**32) if seed is None else seed]}

    def _check_early(self, task: str, options: Mapping[str, Any], size: Any) -> None:
        """Checks the limits with the known facts of a model that may not be open yet."""
        facts = self._models.facts(task)
        steps = options.get("steps", facts.get("steps"))
        if steps is not None:
            self._limits.check_steps(steps)
        size = facts.get("sizes", {}).get(size) if isinstance(size, str) else size
        if size is not None:
            self._limits.check_size(*size)

    @contextmanager
    def _prepare(
        self, task: str, session: Session, request: Request, feed: Feed
    ) -> Iterator[tuple[MemoryPlan, ProgressCallback]]:
        """A context with the plan and the progress callback for a request; checks the limits."""
        self._limits.check(request)
        with self._models.plan(task, request) as plan:
            feed.images = session.own_images(len(request.seeds) * len(request.image_indices))
            progress: ProgressCallback = feed
            if feed.followed and session.pipeline.variant.preview:
                progress = Preview(_Previews(feed), feed, session.pipeline, request)
            yield plan, progress


def _is_image(row: Option) -> bool:
    """Whether an option's value is one or several images."""
    return isinstance(row.kind, ImageFile) or (isinstance(row.kind, Several) and isinstance(row.kind.kind, ImageFile))


class _Previews:
    """Sends previews to a feed, at most one per `_BETWEEN_PREVIEWS`."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self._sent = -math.inf

    def __call__(self, image: Image, step: int, total: int) -> None:
        now = time.monotonic()
        if now - self._sent >= _BETWEEN_PREVIEWS:
            self._sent = now
            self._feed.show(data_url(encode_png(image)))


def control_image_of(body: ControlImageBody) -> dict[str, Any]:
    """What a ControlNet is shown of an image, of about a megapixel; needs no model.

    Raises:
        RequestError: the image cannot be read.
    """
    (image,) = decode([body.image])
    opened = open_image(image)
    return {"image": data_url(encode_png(control_image(opened, body.kind, size_of_area(_SHOWN_PIXELS, opened.size))))}


def compose(body: ComposeBody) -> dict[str, Any]:
    """Composites layers; needs no model.

    Raises:
        RequestError: an image cannot be read, the layers are too large, or a format's library is missing.
    """
    check_formats([body.format])
    images = [open_rgba(image) for image in decode([layer.image for layer in body.layers])]
    scaled = zip(images, body.layers, strict=True)
    pixels = sum(int(image.width * image.height * max(1.0, layer.scale) ** 2) for image, layer in scaled)
    if pixels > _MAX_COMPOSED_PIXELS:
        raise RequestError(f"the layers have {pixels:,} pixels in total; the maximum is {_MAX_COMPOSED_PIXELS:,}")
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
