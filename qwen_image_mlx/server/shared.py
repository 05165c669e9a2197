"""One queue in front of several ranks: rank 0 hands each job to the others, all do its work, and it ends on all alike.

A job that fails or is cancelled on one rank does so on all, at their next exchange (`Ranks.meet`). Between jobs rank 0
calls the others a few times a second: a rank that waits in MLX's ring keeps a core busy, and one that has ended is
noticed. In a single process all of this does nothing. On rank 0 used in the worker's thread, but for `work` and
`status`.
"""

from __future__ import annotations

import base64
import logging
import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ..errors import Cancelled, GPUError, RankError, RequestError
from ..gpu import gpu_error
from ..outside import one_line
from ..runtime.ranks import Ranks
from .api_errors import INTERNAL, ApiError
from .job import Job
from .jobs import Feed, Work
from .models import Models
from .schema import BODIES, Body
from .tasks import Tasks

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

BEAT = 0.2  # seconds between two calls: the longest time that a job waits for the other ranks
_STOP = "stop"
_BYTES = "base64"  # the key of an object that stands for bytes


class SharedTasks:
    """The work of requests, done by all ranks.

    Args:
        ranks: of this server.
        tasks: makes the work of this rank.
        models: of this rank.
    """

    def __init__(self, ranks: Ranks, tasks: Tasks, models: Models):
        self._ranks, self._tasks, self._models = ranks, tasks, models
        self._lost = False  # a rank: then nothing more is exchanged
        self._agreed = False  # on how a job failed

    # Rank 0 -----------------------------------------------------------------------------------------------------------

    def work(self, task: str, body: Body) -> Work:
        """As `Tasks.work`; called in a request's thread."""
        body = self._tasks.with_seed(task, body)
        return self._led(self._tasks.work(task, body), "work", task, body)

    def load(self, task: str) -> Work:
        """As `Tasks.load`."""
        return self._led(self._tasks.load(task), "load", task)

    def unload(self, task: str | None) -> Work:
        """As `Tasks.unload`."""
        return self._led(self._tasks.unload(task), "unload", task)

    def tick(self) -> float | None:
        """Called between jobs; returns the seconds until the next call, or None.

        Raises:
            RankError: a rank has ended.
        """
        pause = self._models.tick()
        if self._ranks.size == 1 or self._lost:
            return pause
        self._order(None)
        return BEAT

    def end(self) -> None:
        """Ends the other ranks, unless one is lost: then they end by themselves."""
        if self._ranks.size > 1 and not self._lost:
            self._order(_STOP)

    def status(self) -> dict[str, Any]:
        """For `/health`: how many ranks there are, and how they shared the last job; nothing for a single process."""
        if self._ranks.size == 1:
            return {}
        mode, parts = self._ranks.shared
        return {"ranks": {"number": self._ranks.size, "mode": mode, "parts": parts}}

    def _led(self, own: Work, kind: str, task: str | None, body: Body | None = None) -> Work:
        if self._ranks.size == 1:
            return own

        def work(feed: Feed) -> Any:
            self._order([kind, task, None if body is None else _packed(body)])
            return self._together(lambda: own(feed))

        return work

    # The other ranks --------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Does the work of rank 0's jobs until rank 0 ends the server; their results are only rank 0's.

        Raises:
            RankError: a rank has ended, or failed alone.
        """
        while (order := self._order(None)) != _STOP:
            if order is None:
                self._models.tick()
                time.sleep(BEAT)
                continue
            try:
                self._together(partial(self._follow, *order))
            except RankError:
                raise
            except GPUError:
                self._models.distrust()
            except Exception:
                logger.debug("the job has failed")  # `_told` has logged it, or rank 0 says how

    def _follow(self, kind: str, task: Any, fields: dict[str, Any] | None) -> None:
        feed = Feed(Job(str(task), None), lambda function, *arguments: function(*arguments), math.inf)
        if kind == "work":
            assert fields is not None
            self._tasks.work(task, BODIES[task].model_validate(_unpacked(fields)))(feed)
        else:
            getattr(self._tasks, kind)(task)(feed)

    # All ranks --------------------------------------------------------------------------------------------------------

    def _order(self, order: Any) -> Any:
        """Rank 0's next order, on every rank: a job, `_STOP`, or None to wait; raises RankError if one has ended."""
        if self._lost:  # an exchange might wait for ever
            raise RankError("a rank has ended: start the server again")
        try:
            return self._ranks.led(lambda: order)
        except RankError:
            self._lost = True
            raise

    def _together(self, work: Callable[[], T]) -> T:
        """Runs this rank's work of a job; every rank calls this.

        Raises:
            RankError: a rank has ended, or this one failed where others wait for it: this process has to end.
            Exception: the work failed, or that of another rank did, which is then named.
        """
        self._agreed, self._ranks.meet = False, self._meet
        try:
            result = work()
            self._meet()
        except RankError:
            self._lost = True
            raise
        except Exception as error:
            if self._agreed:
                raise
            if self._ranks.awaited:
                self._lost = True
                logger.error("%s", traceback.format_exc())
                sentence = f"rank {self._ranks.rank} failed where others wait for it: {one_line(error)}"
                raise RankError(sentence) from error
            self._meet(gpu_error(error) or error)
            raise AssertionError("a failed meeting raises") from error
        finally:
            self._ranks.meet = _go_on
        return result

    def _meet(self, error: Exception | None = None) -> None:
        """Lets all ranks know whether this one goes on; raises, on all, the first error of any."""
        try:
            everyone = self._ranks.gather_values(None if error is None else _told(error))
        except RankError:
            self._lost = True
            raise
        failed = next((rank for rank, told in enumerate(everyone) if told is not None), None)
        if failed is None:
            return
        self._agreed = True
        if error is not None and failed == self._ranks.rank:
            raise error
        raise _error_of(failed, everyone[failed])


def _go_on() -> None:
    """`Ranks.meet` between jobs."""


def _told(error: Exception) -> dict[str, Any]:
    """What the other ranks are told of an error, of JSON's types."""
    if isinstance(error, GPUError):
        return {"kind": "gpu", "message": str(error), "fault": error.fault, "fatal": error.fatal}
    if isinstance(error, ApiError):
        return {"kind": "api", "message": error.message, "code": error.code}
    if isinstance(error, Cancelled | RequestError):
        return {"kind": type(error).__name__, "message": str(error)}
    logger.error("%s", "".join(traceback.format_exception(error)))
    return {"kind": "api", "message": INTERNAL, "code": "internal"}


def _error_of(rank: int, told: dict[str, Any]) -> Exception:
    """The error that a rank told of; rank 0 answers, so only the others are named."""
    message = f"rank {rank}: {told['message']}" if rank else told["message"]
    match told["kind"]:
        case "gpu":
            return GPUError(message, fault=told["fault"], fatal=told["fatal"])
        case "api":
            return ApiError(told["code"], message)
        case "Cancelled":
            return Cancelled(told["message"])
    return RequestError(message)


def _packed(value: Any) -> Any:
    """A body's fields, or a value of them, of JSON's types."""
    if isinstance(value, Body):
        return _packed(value.model_dump(exclude={"task"}, exclude_unset=True))
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {name: _packed(one) for name, one in value.items()}
    return [_packed(one) for one in value] if isinstance(value, list | tuple) else value


def _unpacked(value: Any) -> Any:
    """What was packed."""
    if isinstance(value, dict):
        if _BYTES in value:
            return base64.b64decode(value[_BYTES])
        return {name: _unpacked(one) for name, one in value.items()}
    return [_unpacked(one) for one in value] if isinstance(value, list) else value
