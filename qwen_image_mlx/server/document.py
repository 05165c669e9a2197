"""The OpenAPI document: FastAPI's own, completed with the request bodies that the routes parse themselves."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from .bodies import FORM, JSON
from .images import DATA_URL
from .schema import Body

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "code"],
            "properties": {
                "message": {"type": "string"},
                "code": {"type": ["string", "null"]},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}


class _Operation(dict):
    """Extra fields of an operation in the document, and the body types that it refers to."""

    bodies: tuple[type[Body], ...] = ()


def takes(*bodies: type[Body]) -> dict[str, Any]:
    """The `openapi_extra` of a route that accepts one of these bodies."""
    operation = _Operation({"requestBody": {"required": True, "content": {
        JSON: {"schema": _any_of([body.__name__ for body in bodies])},
        FORM: {"schema": _any_of([f"{body.__name__}Form" for body in bodies])},
    }}})  # fmt: skip
    operation.bodies = bodies
    return operation


def describe(app: FastAPI) -> None:
    """Adds bodies and errors to the application's OpenAPI document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    extras = [getattr(route, "openapi_extra", None) for route in app.routes]
    bodies = dict.fromkeys(body for extra in extras if isinstance(extra, _Operation) for body in extra.bodies)
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in found["$defs"].items():
        schemas[name] = schema
        schemas[f"{name}Form"] = _with_files(schema)
    schemas["Error"] = _ERROR
    for operations in document["paths"].values():
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            problem = {"description": "the error, in one sentence", "content": {JSON: {"schema": _ref("Error")}}}
            answers |= {"4XX": problem, "5XX": problem}
    return document


def _with_files(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the same fields as a form, where images are files."""
    form = deepcopy(schema)

    def change(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("pattern") == DATA_URL:
                del node["pattern"]
                node["format"] = "binary"
            for value in node.values():
                change(value)
        elif isinstance(node, list):
            for value in node:
                change(value)

    change(form)
    return form


def _any_of(names: list[str]) -> dict[str, Any]:
    return _ref(names[0]) if len(names) == 1 else {"anyOf": [_ref(name) for name in names]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=name)}
