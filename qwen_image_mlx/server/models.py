"""Which model does which task, and which of them are in memory: opened when needed, kept warm, released when idle or in
the way of another.

Lives in the worker's thread; only what is marked so may be read from others.
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

_PLANS = 256  # that are kept of a model


@dataclass
class _Warm:
    """An opened model.

    Attributes:
        session: in which it works; it keeps the plans.
        held: bytes of it in memory, as MLX counted them.
        used: when it was used last.
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
        offers: by task, what `open_pipeline` is to open: model, quantize, loras.
        memory: as in `parse_memory`; None is "auto", which keeps a model loaded where it fits.
        idle_seconds: after which an unused model is released; None keeps it.

    Raises:
        RequestError: memory or quantization cannot be understood.
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
        self._progress: ProgressCallback = _unheard  # of the job at work; pipelines outlive it

    # Read from anywhere -----------------------------------------------------------------------------------------------

    def name(self, task: str) -> str:
        """How a task's model is called: a hub id, or of a folder its last part alone."""
        model = str(self._offers[task]["model"])
        path = PurePath(model)
        return path.name if path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2 else model

    def status(self) -> list[dict[str, Any]]:
        """Task, model and whether it is loaded, of every model."""
        return [{"task": task, "model": self.name(task), "loaded": self.is_loaded(task)} for task in self._offers]

    def is_loaded(self, task: str) -> bool:
        """Whether anything of a task's model is in memory."""
        warm = self._warm.get(task)
        return warm is not None and warm.is_loaded

    def facts(self, task: str) -> dict[str, Any]:
        """What the model says of itself, as far as it can be known without downloading: steps, guidance, sizes."""
        return self._facts.get(task, {})

    # In the worker's thread -------------------------------------------------------------------------------------------

    def read_facts(self) -> None:
        """Reads what models say of themselves, from disk alone."""
        for task, offer in self._offers.items():
            try:
                here = QwenImagePipeline.from_pretrained(offer["model"], offline=True, loras=offer["loras"])
                here.check_task(task)
                self._facts[task] = _facts(here)
            except HubError:
                logger.info("%s is fetched when a job needs it", self.name(task))
            except QwenImageError as error:
                logger.warning("the model to %s with cannot be used: %s", task, error)

    @contextmanager
    def telling(self, progress: ProgressCallback) -> Iterator[None]:
        """Tells a job of downloads and loading meanwhile."""
        self._progress = progress
        try:
            yield
        finally:
            self._progress = _unheard

    def open(self, task: str) -> Session:
        """The session of a task's model; raises ApiError if the model cannot be used."""
        if task not in self._warm:
            with _usable(RequestError):
                asked = {**self._offers[task], "memory": self._memory}
                session = Session.open(asked, "", lambda told: self._progress(told), task=task)
                _ = session.pipeline.recommended  # which its LoRAs decide, so they are fetched and read
                self._facts[task] = _facts(session.pipeline)
            self._warm[task] = _Warm(session)
        warm = self._warm[task]
        warm.used = time.monotonic()
        return warm.session

    @contextmanager
    def planned(self, task: str, request: Request) -> Iterator[MemoryPlan]:
        """The plan for a request to a model that is open, with what is not in it out of the way.

        Raises:
            RequestError: nothing fits the memory.
            ApiError: the model cannot be used.
        """
        warm = self._warm[task]
        pipeline, plans = warm.pipeline, warm.session.plans
        try:
            if len(plans) >= _PLANS:
                plans.clear()
            with _usable(), warm.session.planned(request) as plan:
                if plan.residency.staged:
                    warm.release()  # whatever an earlier job left: the first stage has the memory for itself
                elif pipeline.variant.captions and not request.writes_caption(pipeline.variant):
                    pipeline.release(LANGUAGE_HEAD, VISION)
                self._make_room(task, plan.peak)
                with _usable(RequestError):
                    pipeline.prepare()
                yield plan
        finally:
            self._note(task)

    def load(self, task: str, request: Request) -> None:
        """Fetches the files of a model that is open, and loads what a request's plan keeps; raises as `planned`."""
        with self.planned(task, request) as plan:
            if not plan.residency.staged:
                load(self._warm[task].pipeline, request)

    def unload(self, task: str | None) -> None:
        """Gives a model's memory back, or that of all."""
        for name, warm in self._warm.items():
            if task in (None, name):
                warm.release()
        self.encodings.clear()
        mx.clear_cache()

    def distrust(self) -> None:
        """Forgets all models and encodings: after a fault of the GPU what it should have written may be zeros."""
        self.unload(None)
        self._warm.clear()

    def tick(self) -> float | None:
        """Releases what has been idle for long; returns after how many seconds to look again."""
        if self._idle_seconds is None:
            return None
        now, due = time.monotonic(), []
        for task, warm in self._warm.items():
            left = warm.used + self._idle_seconds - now
            if not warm.is_loaded:
                continue
            if left <= 0:
                logger.info("%s is idle and released", self.name(task))
                warm.release()
                self.encodings.clear()
                mx.clear_cache()
            else:
                due.append(left)
        return min(due, default=None)

    def _free(self, task: str) -> int:
        """Bytes that other models leave to a task's."""
        return self._memory.budget - sum(warm.held for name, warm in self._warm.items() if name != task)

    def _make_room(self, task: str, nbytes: int) -> None:
        others = sorted((warm.used, name) for name, warm in self._warm.items() if name != task and warm.is_loaded)
        for _, name in others:
            if self._free(task) >= nbytes:
                return
            logger.info("%s makes room for %s", self.name(name), self.name(task))
            self._warm[name].release()

    def _note(self, task: str) -> None:
        warm = self._warm[task]
        others = sum(other.held for other in self._warm.values() if other is not warm)
        warm.used, warm.held = time.monotonic(), max(0, mx.get_active_memory() - others)


def _unheard(told: Progress) -> None:
    """Nobody is told."""


@contextmanager
def _usable(*more: type[QwenImageError]) -> Iterator[None]:
    """What is wrong with a model is the server's affair: it is logged, and answered without its paths."""
    try:
        yield
    except (CheckpointError, HubError, *more) as error:
        logger.error("%s", error)
        raise ApiError("model_error", "the model of this server cannot be used; its log says why") from error


def _facts(pipeline: QwenImagePipeline) -> dict[str, Any]:
    variant, facts = pipeline.variant, {}
    with suppress(QwenImageError):  # LoRAs that are not here yet
        facts = {"steps": pipeline.recommended.num_inference_steps, "cfg_scale": pipeline.recommended.cfg_scale}
    if "generate" in variant.tasks:
        facts["sizes"] = {aspect: list(variant.size_of(aspect)) for aspect in ASPECT_SIZES}
    if variant.layered:
        facts |= {"resolutions": list(variant.resolutions), "resolution": variant.resolutions[0]}
        facts["captions"] = variant.captions
    return facts
