"""One job: how far it is, and the events that tell of it, numbered, so that a listener may go and come back."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .api_errors import ApiError, dumps

ENDS = ("done", "failed", "cancelled")
_HEARD = 1024  # events that wait for a slow listener, or are told again to one that comes back
Event = tuple[str, dict[str, Any], int]  # name, data, number


class Claim(NamedTuple):
    """By what a request finds a job.

    Attributes:
        digest: of what it asks for.
        key: its Idempotency-Key, or an empty text.
        settled: whether it names a seed, so that an equal one asks for the very same result.
    """

    digest: str
    key: str
    settled: bool


@dataclass(eq=False)
class Job:
    """A piece of work and how far it is; what `GET /jobs/ID` says.

    Attributes:
        task: what it is.
        work: does it, in the worker's thread, and returns what can be written as JSON.
        followed: whether somebody knows its id: then previews are made, and it is remembered.
        nbytes: of what it was sent, which it holds until it ends.
        claim: by what a repeated request finds it.
        waiting: how many requests wait for it.
        unclaimed: whether all of them were cut, and an equal one may still come.
        told: the number of the last event.
        result: what the work returned, as JSON.
        error: {"message", "code"} of a job that failed.
    """

    task: str
    work: Callable[[Any], Any] | None
    followed: bool = False
    nbytes: int = 0
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    status: str = "queued"
    position: int = 0
    stage: str = ""
    detail: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    error: dict[str, str] | None = None
    result: bytes | None = None
    ended: float = 0.0
    preview: Event | None = None
    claim: Claim | None = None
    waiting: int = 0
    unclaimed: bool = False
    told: int = 0
    cancelling: str = ""  # why: a code
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: list[Listener] = field(default_factory=list)
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=_HEARD))  # without previews

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status in ENDS

    @property
    def is_kept(self) -> bool:
        """Whether somebody may ask for it after its end."""
        return self.followed or self.unclaimed or bool(self.claim and self.claim.key)

    def described(self) -> bytes:
        """As JSON."""
        fields = ("id", "task", "status", "position", "stage", "detail", "step", "total", "seconds_left", "error")
        head = dumps({name: getattr(self, name) for name in fields})
        return head[:-1] + b',"result":' + (self.result or b"null") + b"}"

    def since(self, number: int) -> list[Event]:
        """The events after one of this number; for 0, or one that is too old, where it is now; of its end, the end."""
        if number == self.told and number and not self.is_over:
            return []  # all of them were heard
        oldest = self.log[0][2] if self.log else 0
        if not number or not oldest <= number + 1 <= self.told:
            return [(*event, self.told) for event in self.state()]
        preview = [self.preview] if self.preview else []
        return sorted((event for event in [*self.log, *preview] if event[2] > number), key=lambda event: event[2])

    def state(self) -> list[tuple[str, dict[str, Any]]]:
        """The events that tell a new listener where it is."""
        if self.status in ENDS:
            return [self.end()]
        if self.status == "queued":
            return [("queued", {"position": self.position})]
        events: list[tuple[str, dict[str, Any]]] = [("stage", {"stage": self.stage, "detail": self.detail})]
        if self.total:
            events.append(("step", self.progress()))
        if self.preview:
            events.append(self.preview[:2])
        return events

    def progress(self) -> dict[str, Any]:
        """What a `step` event says."""
        return {"step": self.step, "total": self.total, "seconds_left": self.seconds_left}

    def end(self) -> tuple[str, dict[str, Any]]:
        """The last event."""
        return self.status, {"error": self.error} if self.status == "failed" else {}

    def tell(self, event: str, data: dict[str, Any]) -> None:
        """Hands an event to all who listen."""
        self.told += 1
        numbered = event, data, self.told
        if event == "preview":
            self.preview = numbered
        elif self.followed:
            self.log.append(numbered)
        for listener in self.listeners:
            listener.hear(numbered)


def outcome(job: Job) -> bytes:
    """What a job came to; raises ApiError if it failed or was cancelled."""
    if job.result is not None:
        return job.result
    error = job.error or {"code": "cancelled", "message": "the job was cancelled"}
    raise ApiError(error["code"], error["message"])


class Listener:
    """Events that somebody has not read yet; a new preview takes the place of an older one."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_HEARD)
        self._arrived = asyncio.Event()

    def hear(self, event: Event) -> None:
        """Keeps an event until it is read."""
        if event[0] == "preview":
            self._events = deque((e for e in self._events if e[0] != "preview"), maxlen=_HEARD)
        self._events.append(event)
        self._arrived.set()

    async def next(self) -> Event:
        """The next event, once there is one."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()
