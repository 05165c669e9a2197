"""What all routes of the server share: how it is configured, and the way from a request through a job to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ..errors import RequestError
from ..pipeline.parameters import TASKS
from .api_errors import ApiError
from .guard import hand_over
from .job import Job, outcome
from .jobs import Jobs, Work
from .models import Models
from .repeats import Repeats, claim_of
from .schema import Body
from .tasks import Limits, Tasks

_DECODED_AT_ONCE = 2  # bodies whose images are looked at at the same time


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a server is configured.

    Attributes:
        profile: name of the profile of config.toml.
        offers: by task, what `open_pipeline` is to open: model, quantize, loras.
        defaults: by task and field, what the configuration says where a request says nothing.
        memory: as in `parse_memory`; None keeps models loaded where they fit.
        idle_seconds: after which an unused model is released; None keeps it.
        is_own_host: whether a name is one that the server is reached by.
        token: what requests must carry; None asks for nothing.
        aliases: in OpenAI's API, tasks by the other names that their models have.
        origins: web origins beside the server's own that may use it.
        queue: most jobs that wait.
        job_seconds: how long one may work.
        limits: of pixels and steps.
        max_body_bytes: of a request.
        grace: seconds that a job goes on for when the requests that wait for it are cut; see `Repeats`.
    """

    profile: str = "default"
    offers: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {task: {} for task in TASKS})
    memory: str | None = None
    idle_seconds: float | None = 600.0
    is_own_host: Callable[[str], bool]
    token: str | None = None
    aliases: Mapping[str, Collection[str]] = field(default_factory=dict)
    origins: Collection[str] = ()
    queue: int = 16
    job_seconds: float = 3600.0
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 64 << 20
    grace: float = 60.0


class Service:
    """What all routes share.

    Args:
        setup: how the server is configured.
        give_up: called in the event loop when this process can no longer use the GPU.
    """

    def __init__(self, setup: Setup, give_up: Callable[[], None] = lambda: None):
        self.setup = setup
        self.models: Models = Models(setup.offers, setup.memory, setup.idle_seconds)
        self.tasks: Tasks = Tasks(self.models, setup.defaults, setup.limits)
        self.jobs: Jobs = Jobs(
            queue=setup.queue, seconds=setup.job_seconds, idle=self.models.tick,
            begin=self.models.read_facts, distrust=self.models.distrust, give_up=give_up,
            held_bytes=4 * setup.max_body_bytes,
        )  # fmt: skip
        self.repeats: Repeats = Repeats(self.jobs, setup.grace)
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def prepare(self, task: str, body: Any) -> Work:
        """A body's work, its images looked at in another thread; raises ApiError."""
        return await self.aside(self.tasks.work, task, body)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls what takes a while and needs no model in another thread; a RequestError becomes an ApiError."""
        async with self._decoding:
            try:
                return await asyncio.to_thread(function, *arguments)
            except RequestError as error:
                raise ApiError("invalid_request", str(error)) from None

    def submit(self, request: Request, task: str, work: Work, nbytes: int, *, followed: bool = False) -> Job:
        """Takes the work into the queue, with so many bytes of its request; raises ApiError if there is no room."""
        job = self.jobs.submit(task, work, followed=followed, nbytes=nbytes)
        hand_over(request.scope)
        return job

    def check_room(self) -> None:
        """Raises ApiError if no job can be taken now, unless a request may come that repeats an earlier one."""
        if not self.repeats.awaited:
            self.jobs.check_room()

    async def job(
        self, request: Request, task: str, said: Body, make: Callable[[], Awaitable[Work]], *, followed: bool = False
    ) -> Job:
        """The job of a request that waits for its answer: a new one, or that of an earlier copy that was cut.

        Args:
            request: which waits for it.
            task: what it is called.
            said: the request's body.
            make: makes the work, if it is new.
            followed: whether previews are wanted.

        Raises:
            ApiError: the body asks for what cannot be done, or there is no room.
        """
        claim = claim_of(request.url.path, request.headers, said)
        job = self.repeats.find(claim)
        if job is None:
            work = await make()
            job = self.repeats.find(claim)  # its copy may have come meanwhile
            if job is None:
                job = self.submit(request, task, work, said.nbytes, followed=followed)
                job.claim = claim
        return job

    async def result(self, request: Request, task: str, said: Body, make: Callable[[], Awaitable[Work]]) -> bytes:
        """What `job` comes to; a client that goes away cancels it, if it does not come back in time.

        Raises:
            ApiError: it failed or was cancelled.
        """
        job = await self.job(request, task, said, make)
        with self.repeats.waiting(job):
            await self._end(request, job)
        return outcome(job)

    @staticmethod
    async def _end(request: Request, job: Job) -> None:
        """Waits for a job's end, or for its client to go away."""
        waits = {asyncio.create_task(job.finished.wait()), asyncio.create_task(gone(request))}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has gone away."""
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass
