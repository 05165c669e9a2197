"""Runs one job at a time. Other jobs wait in a bounded queue, and listeners get the events of their job.

State belongs to the event loop. The work runs in one worker thread, because MLX's streams belong to threads. The worker
reports with `call_soon_threadsafe`. It writes only three things itself: it takes the next job from the queue, marks a
job that is out of time for cancelling, and records the progress of a job that nobody follows. Independent of models.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from ..errors import Cancelled, GPUError, RankError, RequestError
from ..gpu import gpu_error
from .api_errors import INTERNAL, ApiError, dumps
from .health import Health
from .job import ENDS, Event, Job, Listener

if TYPE_CHECKING:
    from ..pipeline.progress import Progress

logger: logging.Logger = logging.getLogger(__name__)

_COUNTED = ("denoise", "caption", "download")  # stages whose steps are reported
_PAUSE = 0.2  # seconds between reports of a download or a caption
KEPT_SECONDS = 3600.0  # seconds that results are kept
_STOPPING = "the server is stopping"

Work = Callable[["Feed"], Any]


class Feed:
    """The progress callback of a job's work, called in the worker's thread. It also stops the work.

    Args:
        job: the job.
        post: calls a function with its arguments in the event loop's thread.
        seconds: time limit for the work.

    Attributes:
        images: number of images that the work generates one after another; their steps are counted together.
        followed: whether previews are wanted.
    """

    def __init__(self, job: Job, post: Callable[..., None], seconds: float):
        self.images = 1
        self.followed: bool = job.followed
        self._job = job
        # A job that is not followed has no listeners: its state is written directly, without waking the event loop.
        self._post = post if job.followed else lambda function, *arguments: function(*arguments)
        self._deadline = time.monotonic() + seconds
        self._stage = ("", "")
        self._reported = 0.0
        self._generated = 0
        self._pace: tuple[float, int] | None = None  # time and number of the first finished step

    def check(self) -> None:
        """Raises Cancelled if the work should stop."""
        if time.monotonic() > self._deadline and not self._job.cancelling:
            self._job.cancelling = "timeout"
        if self._job.cancelling:
            raise Cancelled(f"cancelled: {self._job.cancelling}")

    def __call__(self, progress: Progress) -> None:
        """Reports a stage or a step."""
        self.check()
        if progress.stage == "layer":
            return
        stage, now = (progress.stage, progress.detail), time.monotonic()
        if stage != self._stage:
            self._stage, self._reported = stage, 0.0
            self._post(self._on_stage, *stage)
        if progress.stage not in _COUNTED:
            return
        denoising = progress.stage == "denoise"
        if not denoising and now - self._reported < _PAUSE and progress.step < progress.total:
            return
        self._reported = now
        step, total, left = progress.step, progress.total, None
        if denoising:
            step, total = step + self._generated * total, total * max(self.images, self._generated + 1)
            left = self._seconds_left(step, total, now)
            self._generated += progress.step == progress.total
        self._post(self._on_step, step, total, left)

    def show(self, url: str) -> None:
        """Reports a preview of the last reported step, as a data URL."""
        self._post(self._on_preview, url)

    def _seconds_left(self, step: int, total: int, now: float) -> float | None:
        """Estimate from the pace after the first step, which is the slowest; None before the second step."""
        if self._pace is None and step >= 1:
            self._pace = now, step
        begun, first = self._pace or (now, step)
        if step in (first, total):
            return 0.0 if step == total else None
        return round((now - begun) / (step - first) * (total - step), 2)

    def _on_stage(self, stage: str, detail: str) -> None:
        job = self._job
        job.stage, job.detail = stage, detail
        job.tell("stage", {"stage": stage, "detail": detail})

    def _on_step(self, step: int, total: int, seconds_left: float | None) -> None:
        job = self._job
        job.step, job.total, job.seconds_left = step, total, seconds_left
        job.tell("step", job.progress())

    def _on_preview(self, url: str) -> None:
        self._job.tell("preview", {"step": self._job.step, "image": url})


class Jobs:
    """The queue, its worker and the finished jobs.

    Args:
        queue: maximum number of waiting jobs.
        held_bytes: maximum bytes of requests that the waiting and the running job hold in total.
        seconds: time limit for one job.
        kept, kept_seconds, kept_bytes: maximum number, age and bytes of results of the finished jobs that are kept.
        begin: called in the worker's thread before the first job.
        idle: called in the worker's thread whenever the queue is empty; returns the seconds until its next call, or
            None.
        end: called in the worker's thread after the last job.
        distrust: called in the worker's thread after a GPU fault, because data in memory may be wrong.
        give_up: called in the event loop when this process can no longer work; all jobs have been cancelled.

    Attributes:
        running: the running job.
        health: whether this process can still work.
    """

    def __init__(
        self,
        *,
        queue: int = 16,
        held_bytes: int = 256 << 20,
        seconds: float = 3600.0,
        kept: int = 64,
        kept_seconds: float = KEPT_SECONDS,
        kept_bytes: int = 256 << 20,
        begin: Callable[[], None] = lambda: None,
        idle: Callable[[], float | None] = lambda: None,
        end: Callable[[], None] = lambda: None,
        distrust: Callable[[], None] = lambda: None,
        give_up: Callable[[], None] = lambda: None,
    ):
        self.queue = queue
        self.running: Job | None = None
        self.health: Health = Health()
        self._held_bytes = held_bytes
        self._seconds = seconds
        self._kept, self._kept_seconds, self._kept_bytes = kept, kept_seconds, kept_bytes
        self._start, self._idle, self._end = begin, idle, end
        self._distrust, self._leave = distrust, give_up
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._durations: deque[float] = deque([1.0], maxlen=8)
        # The maker's context holds how the server reads colours.
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="worker", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # The event loop's side ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the worker; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises ApiError if the queue is full or the server is stopping."""
        if self._closing:
            raise ApiError("stopping", _STOPPING)
        if len(self._waiting) >= self.queue:
            raise self._full(f"the queue is full ({self.queue} jobs)")

    def _full(self, why: str) -> ApiError:
        seconds = sum(self._durations) / len(self._durations)
        left = self.running.seconds_left if self.running else None
        retry = min(600, max(1, math.ceil(seconds if left is None else left)))
        return ApiError("queue_full", f"{why}; try again in {retry} s", {"retry-after": str(retry)})

    def submit(self, task: str, work: Work, *, followed: bool = False, nbytes: int = 0) -> Job:
        """Adds a job to the queue; raises ApiError if it is full. `nbytes` is the size of the request."""
        self.check_room()
        held = sum(job.nbytes for job in self._jobs.values() if job.work is not None)
        if held + nbytes > self._held_bytes:
            raise self._full(f"the queued jobs hold {held:,} bytes of {self._held_bytes:,}")
        self._forget()
        job = Job(task, work, followed, nbytes)
        self._jobs[job.id] = job
        with self._wake:
            self._waiting.append(job)
            self._wake.notify()
        self._place()
        return job

    def get(self, id: str) -> Job:
        """The job with this id; raises ApiError if there is none."""
        self._forget()
        if id not in self._jobs:
            raise ApiError(
                "not_found", "no such job; finished jobs are kept for an hour, and a restart of the server deletes all"
            )
        return self._jobs[id]

    def all(self) -> list[Job]:
        """All jobs: waiting, running and kept."""
        return list(self._jobs.values())

    def drop(self, job: Job) -> None:
        """Deletes a finished job, unless a client may request it."""
        if not job.is_kept:
            self._jobs.pop(job.id, None)

    def cancel(self, job: Job, why: str = "cancelled") -> None:
        """Removes a job from the queue, or stops it at its next step. A finished job does not change."""
        if job.status in ENDS or job.cancelling:
            return
        job.cancelling = why
        with self._wake:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            self._finish(job, None, why)
            self._place()

    async def events(self, job: Job, pause: float = 10.0, since: int = 0) -> AsyncIterator[Event | None]:
        """Yields a job's events after number `since`, until its end; for 0 the current state comes first.

        Yields None after `pause` seconds without an event. A job continues when nobody listens any more.
        """
        listener = Listener()
        for event in job.since(since):
            listener.hear(event)
        job.listeners.append(listener)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(listener.next(), pause)
                except asyncio.TimeoutError:
                    yield None
                    continue
                yield event
                if event[0] in ENDS:
                    return
        finally:
            job.listeners.remove(listener)

    async def close(self) -> None:
        """Cancels all jobs and waits for the worker to end."""
        self.stop()
        await asyncio.to_thread(self._thread.join)

    def stop(self) -> None:
        """Cancels all jobs and accepts no more."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        for job in [*self._waiting, *([self.running] if self.running else ())]:
            self.cancel(job, "stopping")

    def _place(self) -> None:
        """Updates the positions of the waiting jobs."""
        for position, job in enumerate(list(self._waiting), self.running is not None):
            if job.position != position:
                job.position = position
                job.tell("queued", {"position": position})

    def _judge(self, fault: GPUError | RankError | None) -> None:
        """Records whether there was a fault; stops all jobs if this process can no longer work."""
        if fault is None:
            self.health.succeeded()
            return
        self.health.failed(fault)
        if self.health.over:
            self.stop()
            self._leave()

    def _begin(self, job: Job) -> None:
        self.running, job.status, job.position = job, "running", 0
        self._place()
        if self._closing:
            self.cancel(job, "stopping")

    def _finish(self, job: Job, result: bytes | None, code: str = "", message: str = "", seconds: float = 0.0) -> None:
        if self.running is job:
            self.running = None
            self._durations.append(seconds)
        job.ended, job.work, job.preview, job.seconds_left = time.monotonic(), None, None, None
        if code == "cancelled":
            job.status = "cancelled"
        elif code:
            messages = {"timeout": "the job exceeded the time limit", "stopping": _STOPPING}
            job.status, job.error = "failed", {"message": messages.get(code, message), "code": code}
        else:
            job.status, job.result = "done", result
        job.tell(*job.end())
        job.finished.set()
        if not job.is_kept:
            del self._jobs[job.id]
        elif self._loop is not None:
            self._loop.call_later(self._kept_seconds, self._forget)
        self._forget()

    def _forget(self) -> None:
        """Deletes finished jobs beyond the limits of age, number and bytes; the newest one is never too large."""
        ended = sorted((job for job in self._jobs.values() if job.status in ENDS), key=lambda job: -job.ended)
        nbytes, now = 0, time.monotonic()
        for number, job in enumerate(ended):
            nbytes += len(job.result or b"")
            late = now - job.ended >= self._kept_seconds
            if late or (number and (number >= self._kept or nbytes > self._kept_bytes)):
                del self._jobs[job.id]

    # The worker's side ----------------------------------------------------------------------------------------------

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop has ended, and its listeners with it
            logger.debug("the event loop has ended: dropped %s", function.__name__)

    def _work(self) -> None:
        self._call_safely(self._start)
        while self._do_next():
            pass
        self._call_safely(self._end)

    def _do_next(self) -> bool:
        """Runs the next job and drops all references to it; returns whether there was one."""
        job = self._next()
        if job is not None:
            self._do(job)
        return job is not None

    def _next(self) -> Job | None:
        """Waits for the next job; returns None if the worker should end."""
        while True:
            with self._wake:
                if self._waiting:
                    return self._waiting.popleft()
                if self._closing:
                    return None
            pause = self._call_safely(self._idle)
            with self._wake:
                if not self._waiting and not self._closing:
                    self._wake.wait(pause)

    def _call_safely(self, function: Callable[[], Any]) -> Any:
        """Calls a function and returns its result. Errors are logged, and the worker continues."""
        try:
            return function()
        except RankError as error:
            self._post(self._judge, error)
        except Exception:
            logger.error("the worker failed\n%s", traceback.format_exc())

    def _do(self, job: Job) -> None:
        begun = time.monotonic()
        self._post(self._begin, job)
        result, code, message = None, "", ""
        fault: GPUError | RankError | None = None
        try:
            feed = Feed(job, self._post, self._seconds)
            feed.check()
            assert job.work is not None
            result = dumps(job.work(feed))
        except Cancelled:
            code = job.cancelling or "cancelled"
        except RequestError as error:
            code, message = "invalid_request", ApiError("invalid_request", str(error)).message
        except ApiError as error:
            code, message = error.code, error.message
        except BaseException as error:
            fault = error if isinstance(error, RankError) else gpu_error(error)
            if fault is None:
                logger.error("job %s (%s) failed\n%s", job.id, job.task, traceback.format_exc())
                code, message = "internal", INTERNAL
            else:
                logger.error("%s", fault)
                code = "rank_error" if isinstance(fault, RankError) else "gpu_error"
                message = ApiError(code, str(fault)).message
        if fault is not None:
            self._call_safely(self._distrust)
        if fault is not None or not code:
            self._post(self._judge, fault)
        seconds = time.monotonic() - begun
        logger.info("%s %s in %.1f s", job.task, code or "done", seconds)
        self._post(self._finish, job, result, code, message, seconds)
