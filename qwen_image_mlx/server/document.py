"""The OpenAPI document: what FastAPI finds of the routes, with the bodies that they read themselves."""

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


class _Said(dict):
    """What an operation says of itself, and the bodies it names."""

    bodies: tuple[type[Body], ...] = ()


def takes(*bodies: type[Body]) -> dict[str, Any]:
    """What an operation says of its body: that it is one of these; the document asks the routes which they are."""
    said = _Said({"requestBody": {"required": True, "content": {
        JSON: {"schema": _any_of([body.__name__ for body in bodies])},
        FORM: {"schema": _any_of([f"{body.__name__}Form" for body in bodies])},
    }}})  # fmt: skip
    said.bodies = bodies
    return said


def describe(app: FastAPI) -> None:
    """Makes the application's document tell of bodies and errors."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    said = [getattr(route, "openapi_extra", None) for route in app.routes]
    bodies = dict.fromkeys(body for extra in said if isinstance(extra, _Said) for body in extra.bodies)
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
            problem = {"description": "what is wrong, in a sentence", "content": {JSON: {"schema": _ref("Error")}}}
            answers |= {"4XX": problem, "5XX": problem}
    return document


def _with_files(schema: dict[str, Any]) -> dict[str, Any]:
    """The same fields in a form, where images are files."""
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
