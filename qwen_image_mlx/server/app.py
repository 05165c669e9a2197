"""The application: its routes, and what each answers."""

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
from ..pipeline.parameters import TASKS, GenerationParameters
from ..runtime.options import OPTIONS
from . import openai
from .api_errors import INTERNAL, ApiError, dumps
from .bodies import JSON, read_body
from .document import describe, takes
from .guard import Guard
from .job import Job
from .jobs import Feed, Jobs, Work
from .schema import BODIES, JOBS, MAX_NUM_IMAGES, Body, ComposeBody, LoadBody, UnloadBody, form_of
from .service import Service
from .tasks import compose

logger: logging.Logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
# Options that a server has a default for; and those that its models have.
_DEFAULTS = [row.name for row in OPTIONS.values() if row.config and row.tasks]


def create_app(service: Service) -> Guard:
    """The whole application, guarded."""
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
            said = await read_body(request, body)
            return _json(await service.result(request, task, said, lambda: service.prepare(task, said)))

        answer.__doc__ = body.__doc__
        app.add_api_route(f"/api/qwen-image/{task}", answer, methods=["POST"], name=task, openapi_extra=takes(body))

    for task, body in BODIES.items():
        add(task, body)

    @app.post("/api/qwen-image/compose", openapi_extra=takes(ComposeBody))
    async def lay_together(request: Request) -> Response:
        """Layers laid together; answers at once."""
        body = await read_body(request, ComposeBody)
        return _json(dumps(await service.aside(compose, body)))

    @app.get("/api/qwen-image/config")
    async def config() -> Response:
        """Models, defaults, fields of the page's form, and limits."""
        setup = service.setup
        said = {name: value for task in TASKS for name, value in setup.defaults[task].items()}
        return _json(dumps({
            "profile": setup.profile,
            "version": __version__,
            "tasks": {task: _offered(service, task) for task in setup.offers},
            "defaults": {name: said.get(name) for name in _DEFAULTS},
            "fields": {task: form_of(task) for task in setup.offers},
            "limits": {
                "max_pixels": setup.limits.pixels, "max_steps": setup.limits.steps,
                "max_body_bytes": setup.max_body_bytes, "queue": setup.queue, "num_images": MAX_NUM_IMAGES,
            },
        }))  # fmt: skip


def _offered(service: Service, task: str) -> dict[str, Any]:
    """A task's model, and what holds where a request says nothing."""
    said, models = service.setup.defaults[task], service.models
    facts = {"num_layers": GenerationParameters.num_layers} if task == "decompose" else {}
    facts |= models.facts(task)
    return {"model": models.name(task), "loaded": models.is_loaded(task)} | facts | {
        name: said[name] for name in _DEFAULTS if name in said and name in facts
    }  # fmt: skip


def _add_jobs(app: FastAPI, service: Service) -> None:
    jobs = service.jobs

    @app.post("/jobs", status_code=202, openapi_extra=takes(*JOBS.values()))
    async def submit(request: Request) -> Response:
        """Takes a job into the queue."""
        jobs.check_room()
        body = await read_body(request, JOBS)
        work = await service.prepare(body.task, body)
        job = service.submit(request, body.task, work, body.nbytes, followed=True)
        said = {"id": job.id, "status": job.status, "position": job.position, "events": f"/jobs/{job.id}/events"}
        return _json(dumps(said), 202)

    @app.get("/jobs/{id}")
    async def show(id: str) -> Response:
        """How far a job is, and its result."""
        return _json(jobs.get(id).described())

    @app.delete("/jobs/{id}")
    async def cancel(id: str) -> Response:
        """Cancels a job; a finished one stays as it is."""
        job = jobs.get(id)
        jobs.cancel(job)
        return _json(job.described())

    @app.get("/jobs/{id}/events", response_class=StreamingResponse)
    async def events(id: str, request: Request) -> StreamingResponse:
        """What becomes of a job, as server-sent events: queued, stage, step, preview; done, failed or cancelled.

        Listeners may come and go; with Last-Event-ID they hear what came after it.
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
        """Whether the server works, what it has to do, and which models are loaded; 503 after a fault of the GPU."""
        queue = {"running": int(service.jobs.running is not None), "waiting": service.jobs.waiting}
        fault = service.jobs.health.fault
        return _json(dumps({
            "status": "failing" if fault else "ok", "fault": fault or None, "version": __version__, "queue": queue,
            "models": service.models.status(),
        }), 503 if fault else 200)  # fmt: skip

    @app.post("/models/load", openapi_extra=takes(LoadBody))
    async def load(request: Request) -> Response:
        """Fetches a task's model ahead of time, and loads it where the memory lets it stay."""
        body = await read_body(request, LoadBody)

        async def work() -> Work:
            return service.tasks.load(body.task)

        return _json(await service.result(request, "load", body, work))

    @app.post("/models/unload", openapi_extra=takes(UnloadBody))
    async def unload(request: Request) -> Response:
        """Gives back the memory of a task's model, or of all."""
        body = await read_body(request, UnloadBody)

        def work(feed: Feed) -> dict[str, Any]:
            service.models.unload(body.task)
            return {"models": service.models.status()}

        async def made() -> Work:
            return work

        return _json(await service.result(request, "unload", body, made))


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))


# What goes wrong ------------------------------------------------------------------------------------------------------


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    path = request.url.path
    return Response(error.body(path), error.status(path), error.headers, JSON)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router finds: no such path, or another method."""
    assert isinstance(error, HTTPException)
    codes = {404: ("not_found", "there is nothing here"), 405: ("method_not_allowed", "another method is needed here")}
    code, message = codes.get(error.status_code, ("malformed", "the request cannot be read"))
    return await _on_api_error(request, ApiError(code, message, error.headers))


async def _on_fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _on_api_error(request, ApiError("internal", INTERNAL))


def _json(data: bytes, status: int = 200) -> Response:
    return Response(data, status, media_type=JSON)
