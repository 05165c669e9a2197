"""Shared by all routes: the configuration, and the path from a request through a job to its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ..errors import RequestError
from ..pipeline.parameters import TASKS
from ..runtime.ranks import current
from .api_errors import ApiError
from .guard import hand_over
from .job import Job, outcome
from .jobs import Jobs, Work
from .models import Models
from .repeats import Repeats, claim_of
from .schema import Body
from .shared import SharedTasks
from .tasks import Limits, Tasks

_OPENED_BY = ("model", "loras", "memory")  # may differ from rank to rank; the files are compared when they are read
_DECODED_AT_ONCE = 2  # requests whose images are decoded at the same time


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The configuration of a server.

    Attributes:
        profile: name of the profile in config.toml.
        offers: by task, arguments for `open_pipeline`: model, quantize, loras.
        defaults: by task and field, the configured default values.
        memory: memory setting in the form that `parse_memory` reads; None keeps models loaded if they fit.
        idle_seconds: seconds until an unused model is released; None keeps it loaded.
        is_own_host: whether the server accepts a host name.
        token: required from requests; None requires no token.
        controlnets: the references of the ControlNets that requests may name, by name.
        aliases: for OpenAI's API, tasks by additional model name.
        origins: web origins that may use the server, in addition to its own.
        queue: maximum number of waiting jobs.
        job_seconds: time limit for one job.
        limits: maximum pixels and steps.
        max_body_bytes: maximum bytes of a request's body.
        grace: seconds that a job continues after its connections were cut; see `Repeats`.
    """

    profile: str = "default"
    offers: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {task: {} for task in TASKS})
    memory: str | None = None
    idle_seconds: float | None = 600.0
    is_own_host: Callable[[str], bool]
    token: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, Collection[str]] = field(default_factory=dict)
    origins: Collection[str] = ()
    queue: int = 16
    job_seconds: float = 3600.0
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 64 << 20
    grace: float = 60.0


def shared_tasks(setup: Setup, models: Models) -> SharedTasks:
    """The work of requests, with the models of this rank.

    Raises:
        RankError: the ranks have different limits or defaults.
    """
    ranks = current()
    defaults = {task: {name: value for name, value in values.items() if name not in _OPENED_BY}
                for task, values in setup.defaults.items()}  # fmt: skip
    ranks.agree({"the limits": repr(setup.limits), "the defaults": repr(defaults)})
    return SharedTasks(ranks, Tasks(models, setup.defaults, setup.limits, setup.controlnets), models)


def follow(setup: Setup) -> None:
    """Serves as a rank other than the first: works until rank 0 ends the server; raises RankError if one is lost."""
    shared_tasks(setup, Models(setup.offers, setup.memory, setup.idle_seconds)).follow()


class Service:
    """The state shared by all routes.

    Args:
        setup: the configuration.
        give_up: called in the event loop when this process can no longer work.
    """

    def __init__(self, setup: Setup, give_up: Callable[[], None] = lambda: None):
        self.setup = setup
        self.models: Models = Models(setup.offers, setup.memory, setup.idle_seconds)
        self.shared: SharedTasks = shared_tasks(setup, self.models)
        self.jobs: Jobs = Jobs(
            queue=setup.queue, seconds=setup.job_seconds, idle=self.shared.tick, end=self.shared.end,
            begin=self.models.read_facts, distrust=self.models.distrust, give_up=give_up,
            held_bytes=4 * setup.max_body_bytes,
        )  # fmt: skip
        self.repeats: Repeats = Repeats(self.jobs, setup.grace)
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def prepare(self, task: str, body: Any) -> Work:
        """Creates a body's work, and checks its images in a separate thread; raises ApiError."""
        return await self.aside(self.shared.work, task, body)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a slow function that needs no model in a separate thread; turns a RequestError into an ApiError."""
        async with self._decoding:
            try:
                return await asyncio.to_thread(function, *arguments)
            except RequestError as error:
                raise ApiError("invalid_request", str(error)) from None

    def submit(self, request: Request, task: str, work: Work, nbytes: int, *, followed: bool = False) -> Job:
        """Adds work to the queue; raises ApiError if it is full. `nbytes` is the size of the request."""
        job = self.jobs.submit(task, work, followed=followed, nbytes=nbytes)
        hand_over(request.scope)
        return job

    def check_room(self) -> None:
        """Raises ApiError if the queue is full, unless the request may be a repeated one."""
        if not self.repeats.awaited:
            self.jobs.check_room()

    async def job(
        self, request: Request, task: str, body: Body, make: Callable[[], Awaitable[Work]], *, followed: bool = False
    ) -> Job:
        """The job of a request that waits for its result: a new job, or that of an earlier equal request.

        Args:
            request: the waiting request.
            task: the job's name.
            body: the request's body.
            make: creates the work of a new job.
            followed: whether the job makes previews.

        Raises:
            ApiError: the request is invalid, or the queue is full.
        """
        claim = claim_of(request.url.path, request.headers, body)
        job = self.repeats.find(claim)
        if job is None:
            work = await make()
            job = self.repeats.find(claim)  # an equal request may have come meanwhile
            if job is None:
                job = self.submit(request, task, work, body.nbytes, followed=followed)
                job.claim = claim
        return job

    async def result(self, request: Request, task: str, body: Body, make: Callable[[], Awaitable[Work]]) -> bytes:
        """The result of `job` as JSON.

        If the client disconnects and does not repeat the request within the grace period, the job is cancelled.

        Raises:
            ApiError: the job failed or was cancelled.
        """
        job = await self.job(request, task, body, make)
        with self.repeats.waiting(job):
            await self._end(request, job)
        return outcome(job)

    @staticmethod
    async def _end(request: Request, job: Job) -> None:
        """Waits until a job ends or its client disconnects."""
        waits = {asyncio.create_task(job.finished.wait()), asyncio.create_task(gone(request))}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has disconnected."""
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass
