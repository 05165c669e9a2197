"""Reads a request's body, JSON or a form with files, into a body of the schema, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from .api_errors import ApiError
from .schema import Body, TaskOnly, from_form, from_json, parse_object

JSON, FORM = "application/json", "multipart/form-data"
_MAX_PARTS = 200


async def read_body(request: Request, body: type[Body] | Mapping[str, type[Body]]) -> Any:
    """Reads and validates a request's body.

    Args:
        request: the request.
        body: the type of the body; or a mapping from task to type, if the body names its task.

    Raises:
        ApiError: the body cannot be read or is invalid.
    """
    try:
        return await _read(request, body)
    except ClientDisconnect:
        raise ApiError("malformed", "the body ends too early") from None


async def _read(request: Request, body: type[Body] | Mapping[str, type[Body]]) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON:
        data = b"".join([piece async for piece in request.stream()])  # request.body() would keep a second copy
        return await asyncio.to_thread(_from_json, body, data)
    if kind == FORM:
        return await asyncio.to_thread(_from_form, body, await _pairs(request))
    raise ApiError("unsupported_media_type", f"the content type is {kind or 'missing'}, but must be {JSON} or {FORM}")


def _from_json(body: type[Body] | Mapping[str, type[Body]], data: bytes) -> Any:
    fields = parse_object(data)
    return from_json(body[from_json(TaskOnly, fields).task] if isinstance(body, Mapping) else body, fields)


def _from_form(body: type[Body] | Mapping[str, type[Body]], pairs: Sequence[tuple[str, str | bytes]]) -> Any:
    chosen = body[from_form(TaskOnly, dict(pairs)).task] if isinstance(body, Mapping) else body
    return from_form(chosen, _fields(pairs, chosen))


async def _pairs(request: Request) -> list[tuple[str, str | bytes]]:
    """The name and value of each part of a form; files as bytes."""
    try:
        async with request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS) as form:
            return [
                (name, await part.read() if isinstance(part, UploadFile) else part) for name, part in form.multi_items()
            ]
    except HTTPException as error:
        raise ApiError("malformed", f"the form cannot be read: {error.detail}") from None
    except (KeyError, UnicodeError, ValueError) as error:
        raise ApiError("malformed", "the form cannot be read") from error


def _fields(pairs: Iterable[tuple[str, str | bytes]], body: type[Body]) -> Mapping[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        name = body.aliases.get(key, key)
        if name in body.lists:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise ApiError("invalid_request", f"{name} is given twice", param=name)
        else:
            fields[name] = value
    return fields
