"""The server's models by task. They are opened when needed, kept loaded, and released when idle or when another model
needs the memory. Tasks of one model share it.

Used in the worker's thread. Other threads may call only the methods in the first section.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import CheckpointError, HubError, QwenImageError, RequestError
from ..names import Parallel
from ..pipeline.conductor import load
from ..pipeline.pipeline import QwenImagePipeline
from ..registry import LANGUAGE_HEAD, VISION
from ..runtime.cache import RecentEncodings
from ..runtime.memory import parse_memory
from ..runtime.session import Session
from ..variants import ASPECT_SIZES
from ..weights.schemes import NONE, Quantization
from .api_errors import ApiError

if TYPE_CHECKING:
    from ..pipeline.progress import Progress, ProgressCallback
    from ..pipeline.request import Request
    from ..runtime.memory_plan import MemoryPlan

logger: logging.Logger = logging.getLogger(__name__)

_MAX_PLANS = 256  # kept for each model


@dataclass
class _Warm:
    """An opened model.

    Attributes:
        session: the model's session, which keeps the plans.
        held: bytes in memory, as counted by MLX.
        used: time of the last use, by `time.monotonic`.
    """

    session: Session
    held: int = 0
    used: float = 0.0

    @property
    def pipeline(self) -> QwenImagePipeline:
        return self.session.pipeline

    @property
    def is_loaded(self) -> bool:
        return self.pipeline.is_loaded

    def release(self) -> None:
        self.pipeline.release()
        self.held = 0


class Models:
    """The models of a server.

    Args:
        offers: by task, arguments for `open_pipeline`: model, quantize, loras.
        memory: memory setting in the form that `parse_memory` reads; None is "auto", which keeps a model loaded if it
            fits.
        idle_seconds: seconds until an unused model is released; None keeps it loaded.

    Raises:
        RequestError: the memory setting or the quantization is invalid.
    """

    def __init__(self, offers: Mapping[str, Mapping[str, Any]], memory: str | None, idle_seconds: float | None):
        self.encodings: RecentEncodings = RecentEncodings()
        self._offers = offers
        self._memory = parse_memory(memory or "auto")
        for offer in offers.values():
            Quantization.parse(offer["quantize"] or NONE)
        self._idle_seconds = idle_seconds
        self._warm: dict[str, _Warm] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._progress: ProgressCallback = _ignore_progress  # of the running job; pipelines live longer

    # From any thread --------------------------------------------------------------------------------------------------

    def name(self, task: str) -> str:
        """The name of a task's model: a hub id, or the last part of a folder's path."""
        model = str(self._offers[task]["model"])
        path = PurePath(model)
        return path.name if path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2 else model

    def status(self) -> list[dict[str, Any]]:
        """Task, model and whether it is loaded, for every task."""
        return [{"task": task, "model": self.name(task), "loaded": self.is_loaded(task)} for task in self._offers]

    def is_loaded(self, task: str) -> bool:
        """Whether any part of a task's model is in memory."""
        warm = self._warm.get(self._first(task))
        return warm is not None and warm.is_loaded

    def facts(self, task: str) -> dict[str, Any]:
        """A model's defaults, as far as they are known without a download: steps, guidance, sizes."""
        return self._facts.get(task, {})

    # In the worker's thread -------------------------------------------------------------------------------------------

    def read_facts(self) -> None:
        """Reads the defaults of the models that are on disk."""
        for task, offer in self._offers.items():
            try:
                here = QwenImagePipeline.from_pretrained(offer["model"], offline=True, loras=offer["loras"])
                here.check_task(task)
                self._facts[task] = _facts(here)
            except HubError:
                logger.info("%s will be downloaded when a job needs it", self.name(task))
            except QwenImageError as error:
                logger.warning("the model for %s cannot be used: %s", task, error)

    @contextmanager
    def reporting(self, progress: ProgressCallback) -> Iterator[None]:
        """Reports downloads and loading to this callback within the context."""
        self._progress = progress
        try:
            yield
        finally:
            self._progress = _ignore_progress

    def open(self, task: str) -> Session:
        """The session of a task's model; raises ApiError if the model cannot be used."""
        first = self._first(task)
        if first not in self._warm:
            with _hide_details(RequestError):
                options = {**self._offers[task], "memory": self._memory}
                session = Session.open(options, "", lambda progress: self._progress(progress), task=task)
                _ = session.pipeline.recommended  # depends on the LoRAs, so they are downloaded and read
            self._warm[first] = _Warm(session)
        warm = self._warm[first]
        with _hide_details(RequestError):
            warm.pipeline.check_task(task)
        self._facts[task] = _facts(warm.pipeline)
        warm.used = time.monotonic()
        return warm.session

    @contextmanager
    def plan(self, task: str, request: Request, parallel: Parallel | None = None) -> Iterator[MemoryPlan]:
        """A context with the plan for a request to an open model; memory outside the plan is released first.

        Args:
            task: the model is open for it.
            request: the request.
            parallel: how several ranks share it; None is as the server was started.

        Raises:
            RequestError: no plan fits the memory.
            ApiError: the model cannot be used.
        """
        warm = self._warm[self._first(task)]
        pipeline, plans = warm.pipeline, warm.session.plans
        try:
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            with _hide_details(), warm.session.plan(request, parallel) as plan:
                if plan.residency.staged:
                    warm.release()  # parts left by an earlier job: the first stage needs the memory
                elif pipeline.variant.captions and not request.writes_caption(pipeline.variant):
                    pipeline.release(LANGUAGE_HEAD, VISION)
                self._make_room(task, plan.peak)
                with _hide_details(RequestError):
                    pipeline.prepare()
                yield plan
        finally:
            self._note(task)

    def load(self, task: str, request: Request) -> None:
        """Downloads an open model's files, and loads the parts that a request's plan keeps; raises as `plan`."""
        with self.plan(task, request) as plan:
            session = self._warm[self._first(task)].session
            if not plan.residency.staged and session.works:
                load(session.pipeline, request)

    def unload(self, task: str | None) -> None:
        """Releases a task's model, or all models for None."""
        for name, warm in self._warm.items():
            if task is None or name == self._first(task):
                warm.release()
        self.encodings.clear()
        mx.clear_cache()

    def distrust(self) -> None:
        """Drops all models and encodings: after a GPU fault the values in memory may be zeros."""
        self.unload(None)
        self._warm.clear()

    def tick(self) -> float | None:
        """Releases idle models; returns the seconds until the next check, or None."""
        if self._idle_seconds is None:
            return None
        now, due = time.monotonic(), []
        for task, warm in self._warm.items():
            left = warm.used + self._idle_seconds - now
            if not warm.is_loaded:
                continue
            if left <= 0:
                logger.info("%s was idle and is released", self.name(task))
                warm.release()
                self.encodings.clear()
                mx.clear_cache()
            else:
                due.append(left)
        return min(due, default=None)

    def _first(self, task: str) -> str:
        """The first task with the same model, opened in the same way; the key of `_warm`."""
        return next(name for name, offer in self._offers.items() if offer == self._offers[task])

    def _free(self, task: str) -> int:
        """Bytes of the budget that other models do not hold."""
        own = self._first(task)
        return self._memory.budget - sum(warm.held for name, warm in self._warm.items() if name != own)

    def _make_room(self, task: str, nbytes: int) -> None:
        own = self._first(task)
        others = sorted((warm.used, name) for name, warm in self._warm.items() if name != own and warm.is_loaded)
        for _, name in others:
            if self._free(task) >= nbytes:
                return
            logger.info("%s is released to make room for %s", self.name(name), self.name(task))
            self._warm[name].release()

    def _note(self, task: str) -> None:
        warm = self._warm[self._first(task)]
        others = sum(other.held for other in self._warm.values() if other is not warm)
        warm.used, warm.held = time.monotonic(), max(0, mx.get_active_memory() - others)


def _ignore_progress(progress: Progress) -> None:
    """The progress callback when no job runs."""


@contextmanager
def _hide_details(*more: type[QwenImageError]) -> Iterator[None]:
    """Logs a model's errors, and turns them into an ApiError that does not mention the server's paths."""
    try:
        yield
    except QwenImageError as error:
        if type(error) is QwenImageError:  # values that are not finite
            said = str(error)
        elif isinstance(error, (CheckpointError, HubError, *more)):
            said = "the server's model cannot be used; the server's log has the reason"
        else:
            raise
        logger.error("%s", error)
        raise ApiError("model_error", said) from error


def _facts(pipeline: QwenImagePipeline) -> dict[str, Any]:
    variant, facts = pipeline.variant, {}
    with suppress(QwenImageError):  # LoRAs that are not downloaded yet
        facts = {"steps": pipeline.recommended.num_inference_steps, "cfg_scale": pipeline.recommended.cfg_scale}
    if "generate" in variant.tasks:
        facts["sizes"] = {aspect: list(variant.size_of(aspect)) for aspect in ASPECT_SIZES}
    if variant.layered:
        facts |= {"resolutions": list(variant.resolutions), "resolution": variant.resolutions[0]}
        facts["captions"] = variant.captions
    return facts
