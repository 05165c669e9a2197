"""Matches repeated requests to the job of the first one, and decides what a cut connection does to a job.

If the connections of all of a job's requests are cut, the job continues for a grace period, and an equal request finds
it. If requests have a seed, an equal request also finds the job while the first one still waits. Without a seed, two
waiting requests get two images. With an Idempotency-Key, an equal request finds the job as long as results are kept.
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
    """Counts the requests that wait for each job.

    Args:
        jobs: the queue.
        grace: seconds that a job continues after all its connections were cut.
    """

    def __init__(self, jobs: Jobs, grace: float):
        self._jobs, self._grace = jobs, grace
        self._left: dict[Job, asyncio.TimerHandle] = {}  # jobs whose connections were cut, until they are given up

    @property
    def awaited(self) -> bool:
        """Whether a repeated request may come, which needs no room in the queue."""
        return bool(self._left) or any(job.claim and job.claim.key for job in self._jobs.all())

    def find(self, claim: Claim) -> Job | None:
        """The job of an earlier equal request, or None; raises ApiError if the key belongs to a different request."""
        for job in self._jobs.all():
            if job.claim is None or job.claim.key != claim.key or job.status in ("failed", "cancelled"):
                continue
            equal = job.claim.digest == claim.digest
            if claim.key and not equal:
                raise ApiError(
                    "invalid_request",
                    "this Idempotency-Key belongs to a different request; use a new key for each request",
                )
            if equal and not job.cancelling and (claim.key or claim.settled or job in self._left):
                logger.info("a repeated request found its job: %s", job.task)
                return job
        return None

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """A context that counts a waiting request. The job is given up a grace period after the last one left."""
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
    """Adds a value to the digest, unambiguously: different values give different bytes."""
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
