"""The application: its routes and their responses."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from .._version import __version__
from ..pipeline.control import CONTROL_KINDS
from ..pipeline.parameters import TASKS, GenerationParameters
from ..runtime.options import OPTIONS
from . import openai
from .api_errors import INTERNAL, ApiError, dumps
from .bodies import JSON, read_body
from .document import describe, takes
from .guard import Guard
from .job import Job
from .jobs import Jobs, Work
from .schema import BODIES, JOBS, MAX_NUM_IMAGES, Body, ComposeBody, ControlImageBody, LoadBody, UnloadBody, form_of
from .service import Service
from .tasks import compose, control_image_of

logger: logging.Logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
# Options that can have a default in the configuration or in a model.
_DEFAULTS = [row.name for row in OPTIONS.values() if row.config and row.tasks]


def create_app(service: Service) -> Guard:
    """The whole application behind its `Guard`."""
    setup = service.setup

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.jobs.start()
        yield
        await service.jobs.close()

    app = FastAPI(
        title="qwen_image_mlx", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        redirect_slashes=False,
    )  # fmt: skip
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    _add_tasks(app, service)
    _add_jobs(app, service)
    _add_models(app, service)
    openai.add_routes(app, service)
    _add_page(app)
    describe(app)
    return Guard(
        app, is_own_host=setup.is_own_host, token=setup.token, origins=setup.origins,
        max_body_bytes=setup.max_body_bytes,
    )  # fmt: skip


# Routes ---------------------------------------------------------------------------------------------------------------


def _add_tasks(app: FastAPI, service: Service) -> None:
    def add(task: str, body: type[Body]) -> None:
        async def answer(request: Request) -> Response:
            service.check_room()
            fields = await read_body(request, body)
            return _json(await service.result(request, task, fields, lambda: service.prepare(task, fields)))

        answer.__doc__ = body.__doc__
        app.add_api_route(f"/api/qwen-image/{task}", answer, methods=["POST"], name=task, openapi_extra=takes(body))

    for task, body in BODIES.items():
        add(task, body)

    @app.post("/api/qwen-image/compose", openapi_extra=takes(ComposeBody))
    async def composite_layers(request: Request) -> Response:
        """Composite layers. Needs no model and no job."""
        body = await read_body(request, ComposeBody)
        return _json(dumps(await service.aside(compose, body)))

    @app.post("/api/qwen-image/control-image", openapi_extra=takes(ControlImageBody))
    async def show_control(request: Request) -> Response:
        """What a ControlNet is shown of an image. Needs no model and no job."""
        body = await read_body(request, ControlImageBody)
        return _json(dumps(await service.aside(control_image_of, body)))

    @app.get("/api/qwen-image/config")
    async def config() -> Response:
        """Models, defaults, fields of the page's form, and limits."""
        setup = service.setup
        defaults = {name: value for task in TASKS for name, value in setup.defaults[task].items()}
        return _json(dumps({
            "profile": setup.profile,
            "version": __version__,
            "tasks": {task: _describe_task(service, task) for task in setup.offers},
            "defaults": {name: defaults.get(name) for name in _DEFAULTS},
            "controlnets": list(setup.controlnets),
            "control_kinds": list(CONTROL_KINDS),
            "fields": {task: form_of(task) for task in setup.offers},
            "limits": {
                "max_pixels": setup.limits.pixels, "max_steps": setup.limits.steps,
                "max_body_bytes": setup.max_body_bytes, "queue": setup.queue, "num_images": MAX_NUM_IMAGES,
            },
        }))  # fmt: skip


def _describe_task(service: Service, task: str) -> dict[str, Any]:
    """A task's model and the defaults for its requests."""
    defaults, models = service.setup.defaults[task], service.models
    facts = {"num_layers": GenerationParameters.num_layers} if task == "decompose" else {}
    facts |= models.facts(task)
    return {"model": models.name(task), "loaded": models.is_loaded(task)} | facts | {
        name: defaults[name] for name in _DEFAULTS if name in defaults and name in facts
    }  # fmt: skip


def _add_jobs(app: FastAPI, service: Service) -> None:
    jobs = service.jobs

    @app.post("/jobs", status_code=202, openapi_extra=takes(*JOBS.values()))
    async def submit(request: Request) -> Response:
        """Add a job to the queue."""
        jobs.check_room()
        body = await read_body(request, JOBS)
        work = await service.prepare(body.task, body)
        job = service.submit(request, body.task, work, body.nbytes, followed=True)
        answer = {"id": job.id, "status": job.status, "position": job.position, "events": f"/jobs/{job.id}/events"}
        return _json(dumps(answer), 202)

    @app.get("/jobs/{id}")
    async def show(id: str) -> Response:
        """A job's progress and its result."""
        return _json(jobs.get(id).to_json())

    @app.delete("/jobs/{id}")
    async def cancel(id: str) -> Response:
        """Cancel a job. A finished job does not change."""
        job = jobs.get(id)
        jobs.cancel(job)
        return _json(job.to_json())

    @app.get("/jobs/{id}/events", response_class=StreamingResponse)
    async def events(id: str, request: Request) -> StreamingResponse:
        """A job's server-sent events: queued, stage, step, preview; then done, failed or cancelled.

        A client that reconnects with Last-Event-ID gets the events after that one.
        """
        last = request.headers.get("last-event-id", "")
        since = int(last) if last.isascii() and last.isdecimal() and len(last) < 10 else 0
        return StreamingResponse(_stream(jobs, jobs.get(id), since), media_type="text/event-stream")


async def _stream(jobs: Jobs, job: Job, since: int) -> AsyncIterator[bytes]:
    async for event in jobs.events(job, since=since):
        if event is None:
            yield b": still here\n\n"
        else:
            name, data, number = event
            yield b"id: %d\nevent: %s\ndata: %s\n\n" % (number, name.encode(), dumps(data))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Status, queue, loaded models and ranks; 503 after a GPU fault, and when a rank has ended."""
        queue = {"running": int(service.jobs.running is not None), "waiting": service.jobs.waiting}
        fault = service.jobs.health.fault
        return _json(dumps({
            "status": "failing" if fault else "ok", "fault": fault or None, "version": __version__, "queue": queue,
            "models": service.models.status(), **service.shared.status(),
        }), 503 if fault else 200)  # fmt: skip

    @app.post("/models/load", openapi_extra=takes(LoadBody))
    async def load(request: Request) -> Response:
        """Download a task's model ahead of time, and load it if it fits in memory."""
        body = await read_body(request, LoadBody)

        async def work() -> Work:
            return service.shared.load(body.task)

        return _json(await service.result(request, "load", body, work))

    @app.post("/models/unload", openapi_extra=takes(UnloadBody))
    async def unload(request: Request) -> Response:
        """Release a task's model, or all models."""
        body = await read_body(request, UnloadBody)

        async def work() -> Work:
            return service.shared.unload(body.task)

        return _json(await service.result(request, "unload", body, work))


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))


# Errors ---------------------------------------------------------------------------------------------------------------


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    path = request.url.path
    return Response(error.body(path), error.status(path), error.headers, JSON)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answers the router's errors: an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)
    codes = {
        404: ("not_found", "there is nothing at this path"),
        405: ("method_not_allowed", "this path does not support this method"),
    }
    code, message = codes.get(error.status_code, ("malformed", "the request cannot be read"))
    return await _on_api_error(request, ApiError(code, message, error.headers))


async def _on_fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _on_api_error(request, ApiError("internal", INTERNAL))


def _json(data: bytes, status: int = 200) -> Response:
    return Response(data, status, media_type=JSON)
