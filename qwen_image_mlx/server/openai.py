"""OpenAI's images API for OpenAI's clients: generations, edits with a mask, models.

Fields without a meaning here are accepted and ignored, if ignoring their value does not change the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field, StringConstraints, create_model, model_validator
from typing_extensions import Self

from ..errors import RequestError
from ..images.files import encode_png
from ..runtime.options import of_task
from .api_errors import OPENAI_PREFIX, ApiError, dumps
from .bodies import JSON, read_body
from .document import takes
from .images import decode, recode
from .job import Job, outcome
from .schema import (
    MAX_IMAGES,
    MAX_NUM_IMAGES,
    Body,
    EditBody,
    GenerateBody,
    ImageFile,
    Text,
    field_of,
    from_form,
)

if TYPE_CHECKING:
    from .jobs import Work
    from .service import Service

_OWNER = "qwen-image-mlx"
# Model names that are fixed in OpenAI's clients. They mean the model for the task, unless `--alias` defines them.
_FOREIGN = (
    "dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "chatgpt-image-latest",
)  # fmt: skip
_TASKS = {"generate": "image_generation", "edit": "image_edit"}  # and the prefix of each task's events
_MAY_BE_EMPTY = ("prompt", "negative_prompt")  # fields where an empty text is a value
_NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
Size = Annotated[str, StringConstraints(pattern=r"^(auto|[0-9]{2,5}x[0-9]{2,5})$")]


# Sampling options in addition to OpenAI's own fields; `n` is the number of images.
_OURS = [row for row in of_task("generate") if row.group == "sampling" and row.name != "num_images"]


class _Common(Body):
    prompt: Text
    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_NUM_IMAGES)] | None = None
    size: Size | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_blanks(cls, fields: Any) -> Any:
        """Drops empty fields."""
        if not isinstance(fields, dict):
            return fields
        lists = {name: [part for part in fields[name] if part] for name in cls.lists if type(fields.get(name)) is list}
        filled = {**fields, **lists}
        return {
            name: value for name, value in filled.items() if name in _MAY_BE_EMPTY or value not in (None, "", b"", [])
        }

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            raise ValueError("output_compression is for jpeg and webp; with png leave it out, or give 100")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true; without it leave it out, or give 0")
        return self


_Sampled = create_model("_Sampled", __base__=_Common, **{row.name: field_of(row) for row in _OURS})


class Generation(_Sampled):
    """OpenAI's request for images from a prompt, with additional sampling fields (seed, steps, …)."""


class Edit(_Sampled):
    """OpenAI's request for edited images. The transparent area of the mask is inpainted in the first image."""

    lists: ClassVar[tuple[str, ...]] = ("image",)
    aliases: ClassVar[Mapping[str, str]] = {"image[]": "image"}
    image: Annotated[list[ImageFile], Field(min_length=1, max_length=MAX_IMAGES)]
    mask: ImageFile | None = None
    input_fidelity: Literal["high", "low"] | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes of OpenAI's API."""

    async def generate(request: Request, task: str, body: _Common, translated: Callable[[], Body]) -> Response:
        if body.model is not None and task not in _tasks_of(service, body.model):
            _check_model(service, body.model)
            raise ApiError("invalid_request", f"the model {body.model:.100} does not {task}", param="model")
        convert = partial(recode, kind=body.output_format or "png", quality=body.output_compression)

        async def make() -> Work:
            work = await service.prepare(task, await service.aside(translated))

            def answer(feed: Any) -> dict[str, Any]:
                data = [{"b64_json": convert(image["image"])} for image in work(feed)["images"]]
                return {"created": int(time.time()), "data": data, "output_format": body.output_format or "png"}

            return answer

        if not body.stream:
            return Response(await service.result(request, task, body, make), media_type=JSON)
        job = await service.job(request, task, body, make, followed=True)
        return StreamingResponse(_events(service, task, job, body, convert), media_type="text/event-stream")

    @app.post("/v1/images/generations", openapi_extra=takes(Generation))
    async def generations(request: Request) -> Response:
        """Generate images from a prompt."""
        service.check_room()
        body = await read_body(request, Generation)
        return await generate(request, "generate", body, lambda: _generate(body))

    @app.post("/v1/images/edits", openapi_extra=takes(Edit))
    async def edits(request: Request) -> Response:
        """Edit images with a prompt."""
        service.check_room()
        body = await read_body(request, Edit)
        return await generate(request, "edit", body, lambda: _edit(body))

    @app.get("/v1/models")
    async def models() -> Response:
        """The models of this server."""
        names = dict.fromkeys([*(status["model"] for status in service.models.status()), *service.setup.aliases])
        return Response(dumps({"object": "list", "data": [_model(name) for name in names]}), media_type=JSON)

    @app.get("/v1/models/{id:path}")
    async def model(id: str) -> Response:
        """One model of this server."""
        _check_model(service, id)
        return Response(dumps(_model(id)), media_type=JSON)


async def _events(
    service: Service, task: str, job: Job, body: _Common, convert: Callable[[str], str]
) -> AsyncIterator[bytes]:
    """OpenAI's events for a job: `partial_images` evenly spaced previews, then the images."""
    previews, index = body.partial_images or 0, 0
    kind = {
        "created_at": int(time.time()), "size": body.size or "auto", "quality": body.quality or "auto",
        "background": "opaque", "output_format": body.output_format or "png",
    }  # fmt: skip
    with service.repeats.waiting(job):
        async for event in service.jobs.events(job):
            if event is None:
                yield b": still here\n\n"
            elif event[0] == "preview" and index < previews:
                step, total = event[1]["step"], job.total
                if step * (previews + 1) >= (index + 1) * total:
                    image = await service.aside(convert, event[1]["image"])
                    yield _event(f"{_TASKS[task]}.partial_image", kind | {
                        "b64_json": image, "partial_image_index": index,
                    })  # fmt: skip
                    index += 1
        try:
            images = json.loads(outcome(job))["data"]
        except ApiError as error:
            yield b"event: error\ndata: %s\n\n" % error.body(OPENAI_PREFIX)
            return
        for image in images:
            yield _event(f"{_TASKS[task]}.completed", kind | image | {"usage": _NO_USAGE})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), dumps({"type": name} | data))


def _tasks_of(service: Service, name: str) -> Collection[str]:
    """The tasks of the model with this name."""
    if name in service.setup.aliases:
        return service.setup.aliases[name]
    served = [task for task in _TASKS if service.models.name(task) == name]
    return served or (_TASKS if name in _FOREIGN else ())


def _check_model(service: Service, name: str) -> None:
    """Raises ApiError for a model that this server does not have."""
    names = list(dict.fromkeys([*(status["model"] for status in service.models.status()), *service.setup.aliases]))
    if name not in names and name not in _FOREIGN:
        cure = "serve --alias NAME=TASK adds names"
        message = f"unknown model {name!r:.100}; this server has {', '.join(names)}; {cure}"
        raise ApiError("not_found", message, param="model")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": _OWNER}


def _common_options(body: _Common) -> dict[str, Any]:
    fields = ("prompt", *(row.name for row in _OURS))
    values = {name: value for name in fields if (value := getattr(body, name)) is not None}
    return values | {"num_images": body.n or 1}


def _generate(body: Generation) -> GenerateBody:
    size: dict[str, int] = {}
    if body.size not in (None, "auto"):
        width, height = map(int, body.size.split("x"))
        size = {"width": width, "height": height}
    return from_form(GenerateBody, _common_options(body) | size)


def _edit(body: Edit) -> EditBody:
    mask = None if body.mask is None else _white_where_transparent(body.mask)
    size = None if body.size == "auto" else body.size
    edit = {"images": body.image, "mask": mask, "size": size}
    return from_form(
        EditBody, _common_options(body) | {name: value for name, value in edit.items() if value is not None}
    )


def _white_where_transparent(mask: bytes) -> bytes:
    """A PNG mask that is white where OpenAI's mask is transparent; raises RequestError for a mask without alpha."""
    (image,) = decode([mask])
    if not image.has_transparency_data:
        raise RequestError("the mask has no transparency; make the area to inpaint transparent")
    alpha = image.convert("RGBA").getchannel("A")
    return encode_png(alpha.point([255 if value < 128 else 0 for value in range(256)]))
