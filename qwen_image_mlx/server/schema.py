"""The fields of every request with their types and ranges. Unknown fields are refused.

A body is JSON, with numbers and data URLs of images, or multipart/form-data, with numbers as text and images as files.
A server may have tighter limits than the ranges here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
from ..errors import RequestError
from ..layers.stack import MAX_NAME, MAX_OFFSET
from ..pipeline.control import CONTROL_KINDS
from ..pipeline.parameters import TASKS
from ..runtime.options import of_task
from ..variants import VARIANTS
from .api_errors import ApiError
from .images import DATA_URL, image_bytes

MAX_IMAGES = max(variant.max_images or 3 for variant in VARIANTS.values())  # without a limit of its own, three
MAX_NUM_IMAGES = 4
MAX_STACK = 64
MAX_CONTROLS = 4
_MAX_PROMPT = 8000
_MAX_SIDE = 16_384
_SHOWN = 80  # characters of a value in a message
_MAX_COMMAS = 1 << 15  # in JSON: enough for two prompts, a stack's names and all fields
_MAX_VALUES = 1024  # in JSON, at any depth: more than a whole stack has


def _image(value: Any) -> bytes:
    if isinstance(value, bytes) and value:  # a file part
        return value
    if not isinstance(value, str):
        raise ValueError("must be an image: a data URL, or a file part of multipart/form-data")
    return image_bytes(value)


def _writable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain null characters")
    text.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return text


ImageFile = Annotated[bytes, PlainValidator(_image), WithJsonSchema({"type": "string", "pattern": DATA_URL})]
Text = Annotated[str, StringConstraints(max_length=_MAX_PROMPT), AfterValidator(_writable)]
# Maximum values that a server sets where the option has none or a higher one.
_MAXIMUM = {
    "width": _MAX_SIDE, "height": _MAX_SIDE, "mask_padding": _MAX_SIDE, "reference_pixels": 1 << 25,
    "num_images": MAX_NUM_IMAGES, "images": MAX_IMAGES, "controls": MAX_CONTROLS,
}  # fmt: skip


def _parse_by(row: kinds.Option) -> Callable[[str], str]:
    """A validator by an option's own parser."""

    def check(text: str) -> str:
        try:
            return str(row.kind.check(row.name, text))
        except RequestError as error:
            raise ValueError(str(error)) from error

    return check


def field_of(row: kinds.Option) -> tuple[Any, Any]:
    """A body's field for an option: (type, default), as `create_model` takes it."""
    kind, maximum = row.kind, _MAXIMUM.get(row.name)
    match kind:
        case kinds.Integer():
            high = kind.high if maximum is None else maximum
            annotation: Any = Annotated[
                int, Field(ge=kind.low, le=high, multiple_of=kind.step if kind.step > 1 else None)
            ]
        case kinds.Number():
            low = {"gt": kind.low} if kind.above else {"ge": kind.low}
            annotation = Annotated[float, Field(le=kind.high, **low)]
        case kinds.Choice():
            annotation = Literal[kind.values]
        case kinds.Switch():
            annotation = bool
        case kinds.ImageFile():
            annotation = ImageFile
        case kinds.Several(kind=kinds.Group() as group):
            annotation = Annotated[list[_body_of_group(group)], Field(min_length=1, max_length=maximum)]
        case kinds.Several(kind=kinds.ImageFile()):
            annotation = Annotated[list[ImageFile], Field(min_length=1, max_length=maximum)]
        case kinds.Parsed():
            annotation = Annotated[Text, AfterValidator(_parse_by(row))]
        case kinds.Text(pattern=""):
            annotation = Text
        case kinds.Text():
            annotation = Annotated[str, StringConstraints(pattern=kind.pattern)]
        case _:
            raise AssertionError(f"{row.name} has a kind that requests do not support")
    return (annotation | None if row.default is None else annotation), row.default


def _body_of_group(group: kinds.Group) -> type[Body]:
    """The body of an object whose fields are options; its images are bytes."""
    fields = {}
    for field in dataclasses.fields(group.of):
        default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = field_of(dataclasses.replace(group.rows[field.name], default=default))
    name = group.of.__name__
    return create_model(f"{name}Body", __base__=Body, __doc__=f"One {name.lower()}.", **fields)


def form_of(task: str) -> dict[str, dict[str, Any]]:
    """A task's sampling fields for the page's form: type, range or choices, and help, by name."""
    form = {}
    for row in of_task(task):
        if row.group == "sampling" and row.page:
            match row.kind:
                case kinds.Integer(low, high):
                    field: dict[str, Any] = {"type": "integer", "min": low, "max": _MAXIMUM.get(row.name, high)}
                case kinds.Number(low, high):
                    field = {"type": "number", "min": low, "max": high}
                case kinds.Choice(values):
                    field = {"type": "choice", "choices": list(values)}
                case kinds.Switch():
                    field = {"type": "switch"}
                case _:
                    field = {"type": "text"}
            form[row.name] = field | {"help": row.help}
    return form


class Body(BaseModel):
    """A request's fields. Unknown fields are refused.

    Attributes:
        lists: fields that may occur several times in a form.
        aliases: alternative names of fields in a form, with the field's own name.
    """

    lists: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @property
    def nbytes(self) -> int:
        """Total bytes of its images."""
        fields = [value for _, value in self]
        parts = [part for value in fields for part in (value if isinstance(value, list) else [value])]
        inner = sum(part.nbytes for part in parts if isinstance(part, Body))
        return inner + sum(len(part) for part in parts if isinstance(part, bytes))


def _body_of(task: str, doc: str) -> type[Body]:
    """The body of a task: a field for each of its options."""
    fields = {row.name: field_of(row) for row in of_task(task)}
    body = create_model(f"{task.title()}Body", __base__=Body, __doc__=doc, **fields)
    body.lists = tuple(row.name for row in of_task(task) if isinstance(row.kind, kinds.Several))
    return body


GenerateBody: type[Body] = _body_of("generate", "Generate images from a prompt, with or without a starting image.")
EditBody: type[Body] = _body_of("edit", "Edit images with a prompt.")
DecomposeBody: type[Body] = _body_of("decompose", "Decompose an image into layers.")
CaptionBody: type[Body] = _body_of("caption", "Describe an image in text.")


class LayerBody(Body):
    """One layer: its image, its place on the canvas, and how it is blended."""

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
    """Composite layers, back to front, on a canvas with the maximum width and height of the images."""

    lists: ClassVar[tuple[str, ...]] = ("layers",)
    layers: Annotated[
        list[Annotated[LayerBody, BeforeValidator(_bare_layer)]], Field(min_length=1, max_length=MAX_STACK)
    ]
    format: Literal["png", "psd", "ora", "zip"] = "png"


class ControlImageBody(Body):
    """What a ControlNet is shown of an image."""

    image: ImageFile
    kind: Literal[CONTROL_KINDS] = CONTROL_KINDS[0]


class LoadBody(Body):
    """The task whose model is loaded."""

    task: Literal[TASKS]


class UnloadBody(Body):
    """The task whose model is released; without a task, all models."""

    task: Literal[TASKS] | None = None


def _job_of(task: str, body: type[Body]) -> type[Body]:
    """A task's fields, with `task` added."""
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
    """The field that selects the type of the body."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", hide_input_in_errors=True)

    task: Literal[tuple(BODIES)]


def from_json(body: type[BaseModel], data: Mapping[str, Any]) -> Any:
    """A body from a JSON object, with exact types; raises ApiError."""
    try:
        return body.model_validate(data, strict=True)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_object(data: bytes) -> Mapping[str, Any]:
    """Parses a JSON object; raises ApiError, also for more values than a body can have, since each costs an error."""
    if data.count(b",") > _MAX_COMMAS:
        raise _too_many()
    try:
        value = parsed_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError("malformed", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_request", "the body must be a JSON object with field names as keys")
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
    """A body from the fields of a form, with numbers as text; raises ApiError."""
    try:
        return body.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """The first error, as a sentence; a number or the beginning of a text is repeated."""
    first = error.errors(include_url=False, include_context=False)[0]
    place, value = ".".join(str(part) for part in first["loc"]), first["input"]
    message = first["msg"].removeprefix("Value error, ")
    known = {
        "extra_forbidden": "is an unknown field", "missing": "is missing", "model_type": "must be an object",
    }.get(first["type"], message)  # fmt: skip
    if known.startswith("Input ") and isinstance(value, str | int | float):
        shown = repr(value[:_SHOWN] if isinstance(value, str) else value)
        sentence = f"{place} is {shown:.{_SHOWN}}, but {known.removeprefix('Input ')}"
    elif known.startswith(f"{place} "):
        sentence = known
    else:
        sentence = f"{place or 'the body'}: {known[0].lower() + known[1:] if known.startswith('Input') else known}"
    return ApiError("invalid_request", sentence, param=place or None)
