"""One job: its state and its numbered events. The numbers let a listener disconnect and resume."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .api_errors import ApiError, dumps

ENDS = ("done", "failed", "cancelled")
_MAX_EVENTS = 1024  # kept for a slow listener, and for one that resumes
Event = tuple[str, dict[str, Any], int]  # name, data, number


class Claim(NamedTuple):
    """Identifies equal requests, so that a repeated one finds the earlier job.

    Attributes:
        digest: hash of the path and the fields.
        key: its Idempotency-Key, or an empty text.
        settled: whether the request has a seed, so that an equal request has the same result.
    """

    digest: str
    key: str
    settled: bool


@dataclass(eq=False)
class Job:
    """A piece of work and its state; `GET /jobs/ID` returns it.

    Attributes:
        task: name of the task.
        work: function that runs in the worker's thread and returns a JSON value; None after the end.
        followed: whether a client has its id. Then it gets previews, and is kept after its end.
        nbytes: bytes of its request, which it holds until it ends.
        claim: identifies a repeated request.
        waiting: number of requests that wait for it.
        unclaimed: whether all of their connections were cut, but an equal request may still come.
        event_number: number of the last event.
        result: the work's return value, as JSON.
        error: {"message", "code"} of a failed job.
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
    event_number: int = 0
    cancelling: str = ""  # the reason: an error code
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: list[Listener] = field(default_factory=list)
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=_MAX_EVENTS))  # without previews

    @property
    def is_over(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.status in ENDS

    @property
    def is_kept(self) -> bool:
        """Whether a client may request the job after its end."""
        return self.followed or self.unclaimed or bool(self.claim and self.claim.key)

    def to_json(self) -> bytes:
        """The job's state and result as JSON."""
        fields = ("id", "task", "status", "position", "stage", "detail", "step", "total", "seconds_left", "error")
        head = dumps({name: getattr(self, name) for name in fields})
        return head[:-1] + b',"result":' + (self.result or b"null") + b"}"

    def since(self, number: int) -> list[Event]:
        """The events after event `number`.

        For 0, for a number that is too old, and for the last event of a finished job: events that describe the state.
        """
        if number == self.event_number and number and not self.is_over:
            return []  # the listener has had all events
        oldest = self.log[0][2] if self.log else 0
        if not number or not oldest <= number + 1 <= self.event_number:
            return [(*event, self.event_number) for event in self.state()]
        preview = [self.preview] if self.preview else []
        return sorted((event for event in [*self.log, *preview] if event[2] > number), key=lambda event: event[2])

    def state(self) -> list[tuple[str, dict[str, Any]]]:
        """Events that describe the current state, for a new listener."""
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
        """The data of a `step` event."""
        return {"step": self.step, "total": self.total, "seconds_left": self.seconds_left}

    def end(self) -> tuple[str, dict[str, Any]]:
        """The name and data of the last event."""
        return self.status, {"error": self.error} if self.status == "failed" else {}

    def tell(self, event: str, data: dict[str, Any]) -> None:
        """Sends an event to all listeners."""
        self.event_number += 1
        numbered = event, data, self.event_number
        if event == "preview":
            self.preview = numbered
        elif self.followed:
            self.log.append(numbered)
        for listener in self.listeners:
            listener.hear(numbered)


def outcome(job: Job) -> bytes:
    """A finished job's result as JSON; raises ApiError if it failed or was cancelled."""
    if job.result is not None:
        return job.result
    error = job.error or {"code": "cancelled", "message": "the job was cancelled"}
    raise ApiError(error["code"], error["message"])


class Listener:
    """A queue of unread events. A new preview replaces an older one."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._arrived = asyncio.Event()

    def hear(self, event: Event) -> None:
        """Adds an event."""
        if event[0] == "preview":
            self._events = deque((e for e in self._events if e[0] != "preview"), maxlen=_MAX_EVENTS)
        self._events.append(event)
        self._arrived.set()

    async def next(self) -> Event:
        """Waits for the next event."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()
