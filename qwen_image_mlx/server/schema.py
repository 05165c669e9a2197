"""What may be asked for: the fields of every task with their types and ranges. Anything else is refused.

A body is JSON, where a number is a number and an image a data URL, or multipart/form-data, where numbers are text and
images file parts. What the ranges here allow a server may still limit further.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import from_json as parsed_json

from .. import options as kinds
from ..layers.stack import MAX_NAME, MAX_OFFSET
from ..pipeline.parameters import TASKS
from ..runtime.options import of_task
from ..variants import VARIANTS
from .api_errors import ApiError
from .images import DATA_URL, image_bytes

MAX_IMAGES = max(variant.max_images or 3 for variant in VARIANTS.values())  # without a limit of its own, three
MAX_NUM_IMAGES = 4
MAX_STACK = 64
_MAX_PROMPT = 8000
_MAX_SIDE = 16_384
_MAX_COMMAS = 1 << 15  # in JSON: of two prompts and a stack's names, and each field's
_MAX_VALUES = 1024  # in JSON, at any depth: more than a whole stack's


def _image(value: Any) -> bytes:
    if isinstance(value, bytes) and value:  # a file part
        return value
    if not isinstance(value, str):
        raise ValueError("must be an image: a data URL, or a file part of multipart/form-data")
    return image_bytes(value)


def _writable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold null characters")
    text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return text


ImageFile = Annotated[bytes, PlainValidator(_image), WithJsonSchema({"type": "string", "pattern": DATA_URL})]
Text = Annotated[str, StringConstraints(max_length=_MAX_PROMPT), AfterValidator(_writable)]
# Ends that a server sets where the option has none, or a wider one.
_HIGHEST = {
    "width": _MAX_SIDE, "height": _MAX_SIDE, "mask_padding": _MAX_SIDE, "reference_pixels": 1 << 25,
    "num_images": MAX_NUM_IMAGES, "images": MAX_IMAGES,
}  # fmt: skip


def field_of(row: kinds.Option) -> tuple[Any, Any]:
    """A body's field for an option: (type, default), as `create_model` takes it."""
    kind, highest = row.kind, _HIGHEST.get(row.name)
    match kind:
        case kinds.Integer():
            high = kind.high if highest is None else highest
            said: Any = Annotated[int, Field(ge=kind.low, le=high, multiple_of=kind.step if kind.step > 1 else None)]
        case kinds.Number():
            low = {"gt": kind.low} if kind.above else {"ge": kind.low}
            said = Annotated[float, Field(le=kind.high, **low)]
        case kinds.Choice():
            said = Literal[kind.values]
        case kinds.Switch():
            said = bool
        case kinds.ImageFile():
            said = ImageFile
        case kinds.Several(kind=kinds.ImageFile()):
            said = Annotated[list[ImageFile], Field(min_length=1, max_length=highest)]
        case kinds.Text(pattern=""):
            said = Text
        case kinds.Text():
            said = Annotated[str, StringConstraints(pattern=kind.pattern)]
        case _:
            raise AssertionError(f"{row.name} is of a kind that no request can have")
    return (said | None if row.default is None else said), row.default


def form_of(task: str) -> dict[str, dict[str, Any]]:
    """What the page's form offers of sampling for a task: by the names of fields, their types, ends and help."""
    form = {}
    for row in of_task(task):
        if row.group == "sampling" and row.page:
            match row.kind:
                case kinds.Integer(low, high):
                    said: dict[str, Any] = {"type": "integer", "min": low, "max": _HIGHEST.get(row.name, high)}
                case kinds.Number(low, high):
                    said = {"type": "number", "min": low, "max": high}
                case kinds.Choice(values):
                    said = {"type": "choice", "choices": list(values)}
                case kinds.Switch():
                    said = {"type": "switch"}
                case _:
                    said = {"type": "text"}
            form[row.name] = said | {"help": row.help}
    return form


class Body(BaseModel):
    """A request's fields; unknown ones are refused.

    Attributes:
        lists: fields that a form may hold several times.
        aliases: other names that fields may have in a form.
    """

    lists: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @property
    def nbytes(self) -> int:
        """Of its images."""
        fields = [value for _, value in self]
        parts = [part for value in fields for part in (value if isinstance(value, list) else [value])]
        return sum(len(part) for part in parts if isinstance(part, bytes))


def _body_of(task: str, said: str) -> type[Body]:
    """The body of a task: a field for each of its options."""
    fields = {row.name: field_of(row) for row in of_task(task)}
    body = create_model(f"{task.title()}Body", __base__=Body, __doc__=said, **fields)
    body.lists = tuple(row.name for row in of_task(task) if isinstance(row.kind, kinds.Several))
    return body


GenerateBody: type[Body] = _body_of("generate", "An image from words, or an image started from.")
EditBody: type[Body] = _body_of("edit", "Images changed by instruction.")
DecomposeBody: type[Body] = _body_of("decompose", "An image decomposed into layers.")
CaptionBody: type[Body] = _body_of("caption", "An image described in words.")


class LayerBody(Body):
    """One layer: its image, and where and how it lies on the canvas."""

    image: ImageFile
    name: Annotated[str, StringConstraints(max_length=MAX_NAME), AfterValidator(_writable)] = ""
    x: Annotated[int, Field(ge=-MAX_OFFSET, le=MAX_OFFSET)] = 0
    y: Annotated[int, Field(ge=-MAX_OFFSET, le=MAX_OFFSET)] = 0
    scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    opacity: Annotated[float, Field(ge=0, le=1)] = 1.0
    visible: bool = True


def _bare_layer(value: Any) -> Any:
    return {"image": value} if isinstance(value, bytes) else value


class ComposeBody(Body):
    """Layers laid together, from back to front, on a canvas as wide and high as the largest."""

    lists: ClassVar[tuple[str, ...]] = ("layers",)
    layers: Annotated[
        list[Annotated[LayerBody, BeforeValidator(_bare_layer)]], Field(min_length=1, max_length=MAX_STACK)
    ]
    format: Literal["png", "psd", "ora", "zip"] = "png"


class LoadBody(Body):
    """Which model is to be loaded."""

    task: Literal[TASKS]


class UnloadBody(Body):
    """Which model is to be released; all of them without a task."""

    task: Literal[TASKS] | None = None


def _job_of(task: str, body: type[Body]) -> type[Body]:
    """A task's fields, and `task` among them."""
    fields: dict[str, Any] = {"task": (Literal[task], ...)}
    return create_model(f"{task.title()}Job", __base__=body, __doc__=f"`{task}` as a job.", **fields)


BODIES: dict[str, type[Body]] = {
    "generate": GenerateBody,
    "edit": EditBody,
    "decompose": DecomposeBody,
    "caption": CaptionBody,
}
JOBS: dict[str, type[Body]] = {task: _job_of(task, body) for task, body in BODIES.items()}


class TaskOnly(BaseModel):
    """The field that says which others there may be."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", hide_input_in_errors=True)

    task: Literal[tuple(BODIES)]


def from_json(body: type[BaseModel], data: Mapping[str, Any]) -> Any:
    """A body from an object of JSON, where types are exact; raises ApiError."""
    try:
        return body.model_validate(data, strict=True)
    except ValidationError as error:
        raise _refusal(error) from None


def parsed(data: bytes) -> Mapping[str, Any]:
    """An object of JSON, if it has no more values than a body can have: each may be an error; raises ApiError."""
    if data.count(b",") > _MAX_COMMAS:
        raise _too_many()
    try:
        value = parsed_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError("malformed", f"the body is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_request", "the body must be an object of JSON: fields by their names")
    left, values = _MAX_VALUES, [value]
    while values:
        values = list(chain.from_iterable(_values_of(value) for value in values))
        left -= len(values)
        if left < 0:
            raise _too_many()
    return value


def _too_many() -> ApiError:
    return ApiError("invalid_request", "the body has more fields or entries than any request needs")


def _values_of(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def from_form(body: type[BaseModel], fields: Mapping[str, Any]) -> Any:
    """A body from the fields of a form, where numbers are text; raises ApiError."""
    try:
        return body.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in a sentence without what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    known = {
        "extra_forbidden": "is not a field that is known", "missing": "is missing", "model_type": "must be an object",
    }.get(first["type"], said)  # fmt: skip
    known = known[0].lower() + known[1:] if known.startswith("Input") else known
    return ApiError("invalid_request", f"{place or 'the body'}: {known}", param=place or None)
