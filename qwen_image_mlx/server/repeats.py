"""Requests that wait for their answer, and what a cut connection does to their jobs.

A job whose requests are all cut goes on for a grace; an equal request finds it until then. Where requests name a seed,
an equal one finds it while the first still waits; without one, two that both wait want two images. With an
Idempotency-Key a request finds the job of its first copy for as long as results are kept, cut or not.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from .api_errors import ApiError
from .job import Claim, Job
from .jobs import Jobs

logger: logging.Logger = logging.getLogger(__name__)


def claim_of(path: str, headers: Mapping[str, str], body: BaseModel) -> Claim:
    """The claim of a request."""
    digest = hashlib.sha256(path.encode())
    _add(digest, body)
    key = headers.get("idempotency-key", "").strip()
    return Claim(digest.hexdigest(), key, getattr(body, "seed", None) is not None)


class Repeats:
    """Who waits for which job.

    Args:
        jobs: the queue.
        grace: seconds that a job goes on for when all its requests were cut.
    """

    def __init__(self, jobs: Jobs, grace: float):
        self._jobs, self._grace = jobs, grace
        self._left: dict[Job, asyncio.TimerHandle] = {}  # cut off, until they are given up

    @property
    def awaited(self) -> bool:
        """Whether a request may come that needs no room in the queue."""
        return bool(self._left) or any(job.claim and job.claim.key for job in self._jobs.all())

    def find(self, claim: Claim) -> Job | None:
        """The job that an earlier copy of a request began; raises ApiError for a key that belongs to another one."""
        for job in self._jobs.all():
            if job.claim is None or job.claim.key != claim.key or job.status in ("failed", "cancelled"):
                continue
            equal = job.claim.digest == claim.digest
            if claim.key and not equal:
                raise ApiError("invalid_request", "this Idempotency-Key came with another request; give each its own")
            if equal and not job.cancelling and (claim.key or claim.settled or job in self._left):
                logger.info("a repeated request found its job: %s", job.task)
                return job
        return None

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """Counts a request that waits for a job; without any it is given up after the grace."""
        timer = self._left.pop(job, None)
        if timer is not None:
            timer.cancel()
        job.waiting += 1
        job.unclaimed = False
        try:
            yield
        finally:
            job.waiting -= 1
            if not job.waiting:
                self._leave(job)

    def _leave(self, job: Job) -> None:
        if job.is_over:
            self._jobs.drop(job)
            return
        job.unclaimed = True
        self._left[job] = asyncio.get_running_loop().call_later(self._grace, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        del self._left[job]
        job.unclaimed = False
        self._jobs.cancel(job)
        if job.is_over:
            self._jobs.drop(job)


def _add(digest: Any, value: Any) -> None:
    """Adds a value so that no two different ones read the same."""
    if isinstance(value, BaseModel):
        value = [type(value).__name__, *(part for pair in value for part in pair)]
    if isinstance(value, list):
        digest.update(b"[%d" % len(value))
        for part in value:
            _add(digest, part)
        return
    data = value if isinstance(value, bytes) else repr(value).encode()
    digest.update(b"%s%d:" % (type(value).__name__.encode(), len(data)))
    digest.update(data)
