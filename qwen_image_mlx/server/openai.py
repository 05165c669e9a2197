"""OpenAI's images API, as its own clients speak it: generations, edits with a mask, models.

Fields that mean nothing here are taken and have no effect, if their values ask for nothing that would be missed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, StringConstraints

from ..errors import RequestError
from ..images.files import encode_png
from .answers import ApiError, dumps
from .bodies import JSON, read_body
from .document import takes
from .pictures import decoded
from .schema import (
    MAX_NUM_IMAGES,
    MAX_PICTURES,
    Body,
    EditBody,
    GenerateBody,
    Guidance,
    Picture,
    Seed,
    Steps,
    Text,
    from_form,
)

if TYPE_CHECKING:
    from .app import Service

_OWNER = "qwen-image-mlx"
Size = Annotated[str, StringConstraints(pattern=r"^(auto|[0-9]{2,5}x[0-9]{2,5})$")]


class _Common(Body):
    prompt: Text
    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_NUM_IMAGES)] | None = None
    size: Size | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    stream: Literal[False] | None = None
    user: Text | None = None
    seed: Seed | None = None
    steps: Steps | None = None
    cfg_scale: Guidance | None = None
    negative_prompt: Text | None = None


class Generation(_Common):
    """OpenAI's request for pictures from words; `seed`, `steps`, `cfg_scale`, `negative_prompt` are ours."""

    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None


class Edit(_Common):
    """OpenAI's request for edited pictures; the mask is transparent where the first is painted anew."""

    lists = ("image",)
    aliases: ClassVar[Mapping[str, str]] = {"image[]": "image"}
    image: Annotated[list[Picture], Field(min_length=1, max_length=MAX_PICTURES)]
    mask: Picture | None = None
    input_fidelity: Literal["high", "low"] | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes of OpenAI's API."""

    async def paint(request: Request, task: str, body: _Common, translated: Callable[[], Body]) -> Response:
        if body.model is not None and body.model != service.models.name(task):
            _known(service, body.model)
            raise ApiError("invalid_request", f"the model {body.model} does not {task}", param="model")
        said = await service.aside(translated)
        work = await service.prepare(task, said)

        def answer(feed: Any) -> dict[str, Any]:
            images = work(feed)["images"]
            data = [{"b64_json": image["image"].partition(",")[2]} for image in images]
            return {"created": int(time.time()), "data": data}

        return Response(await service.result(request, task, answer, said.nbytes), media_type=JSON)

    @app.post("/v1/images/generations", openapi_extra=takes(Generation))
    async def generations(request: Request) -> Response:
        """Pictures from words."""
        service.jobs.check_room()
        body = await read_body(request, Generation)
        return await paint(request, "generate", body, lambda: _generate(body))

    @app.post("/v1/images/edits", openapi_extra=takes(Edit))
    async def edits(request: Request) -> Response:
        """Pictures changed by instruction."""
        service.jobs.check_room()
        body = await read_body(request, Edit)
        return await paint(request, "edit", body, lambda: _edit(body))

    @app.get("/v1/models")
    async def models() -> Response:
        """The models of this server."""
        names = dict.fromkeys(status["model"] for status in service.models.status())
        return Response(dumps({"object": "list", "data": [_model(name) for name in names]}), media_type=JSON)

    @app.get("/v1/models/{id:path}")
    async def model(id: str) -> Response:
        """One of them."""
        _known(service, id)
        return Response(dumps(_model(id)), media_type=JSON)


def _known(service: Service, name: str) -> None:
    """Raises ApiError for a model that this server does not have."""
    names = [status["model"] for status in service.models.status()]
    if name not in names:
        raise ApiError("not_found", f"there is no model {name!r:.100}; there are {', '.join(names)}", param="model")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": _OWNER}


def _shared(body: _Common) -> dict[str, Any]:
    fields = ("prompt", "seed", "steps", "cfg_scale", "negative_prompt")
    given = {name: value for name in fields if (value := getattr(body, name)) is not None}
    return given | {"num_images": body.n or 1}


def _generate(body: Generation) -> GenerateBody:
    size: dict[str, int] = {}
    if body.size not in (None, "auto"):
        width, height = map(int, body.size.split("x"))
        size = {"width": width, "height": height}
    return from_form(GenerateBody, _shared(body) | size)


def _edit(body: Edit) -> EditBody:
    mask = None if body.mask is None else _painted_anew(body.mask)
    size = None if body.size == "auto" else body.size
    edit = {"images": body.image, "mask": mask, "size": size}
    return from_form(EditBody, _shared(body) | {name: value for name, value in edit.items() if value is not None})


def _painted_anew(mask: bytes) -> bytes:
    """White where a mask is transparent, as a PNG; raises RequestError if it has no transparency."""
    (picture,) = decoded([mask])
    if not picture.has_transparency_data:
        raise RequestError("the mask has no transparency; what is transparent in it is painted anew")
    alpha = picture.convert("RGBA").getchannel("A")
    return encode_png(alpha.point([255 if value < 128 else 0 for value in range(256)]))
