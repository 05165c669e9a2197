"""A training run and its folder: encoding, training, checkpoints, samples, and the order of memory use.

```
checkpoints/step-000250.safetensors   from which the run resumes; the last two
lora-000250.safetensors               the LoRA of that step (of all weights: nothing)
samples/step-000250.png               the samples of that step
cache/                                encoded examples, and the modulation of every noise level
log.jsonl  plot.png                   every step's loss; the curve and the latest samples
lora.safetensors  or  model/          the result
```
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, OutputError, QwenImageError, RequestError
from ..files import check_writable, is_from_macos, reason, replace_file, sweep
from ..images.colour import profiles_are_ignored
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.progress import ProgressCallback
from ..registry import TRANSFORMER
from ..weights.loader import load_module
from .checkpoints import KEPT, last_checkpoint, load_checkpoint, save_checkpoint
from .dataset import Dataset, digest_of, encode_examples
from .examples import Example
from .export import save_model
from .loop import LoopSettings, NotFinite, StepResult, Trainer
from .lora import add_lora, check_lora, matrices, save_lora
from .loss import FlowMatching, training_shift
from .optimizers import Optimizer, Rate
from .plot import plot_run
from .samples import Samples, painter_of
from .seam import trainable_of
from .settings import TASKS, TrainingSettings

logger: logging.Logger = logging.getLogger(__name__)

CHECKPOINTS, CACHE, SAMPLES, LOG, PLOT = "checkpoints", "cache", "samples", "log.jsonl", "plot.png"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        result: the LoRA or the model; None if it was stopped before its last step.
        checkpoint: the last one.
        steps: number of steps done.
    """

    result: Path | None
    checkpoint: Path
    steps: int


def train(
    pipeline: QwenImagePipeline,
    examples: Sequence[Example],
    settings: TrainingSettings,
    folder: Path,
    *,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    on_step: Callable[[StepResult], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Fine-tunes a model.

    Args:
        pipeline: opened from the model, without LoRAs.
        examples: of the task that the model is for.
        settings: how.
        folder: of the run; new or empty, unless it is resumed.
        resume: continue from the folder's last checkpoint.
        progress: called for the examples' encoding and the samples' steps.
        on_step: called after every step.
        stop: called after every step; True saves and stops.

    Raises:
        RequestError: something does not fit the model, or the folder belongs to a different run.
        CheckpointError: the checkpoint to resume from is damaged or belongs to a different run.
        OutputError: something could not be written; the last checkpoint stays.
        NotFinite: the loss is not finite; the message names the last good checkpoint.

    A run that is refused before its first checkpoint leaves nothing behind.
    """
    _check(pipeline, examples, settings, folder, resume)
    existed = folder.is_dir()
    try:
        return _train(pipeline, examples, settings, folder, resume, progress, on_step, stop)
    except (RequestError, CheckpointError, NotFinite):
        if (
            not resume and last_checkpoint(folder / CHECKPOINTS) is None
        ):  # nothing to resume, and everything in it is ours
            for place in (CHECKPOINTS, CACHE, SAMPLES):
                shutil.rmtree(folder / place, ignore_errors=True)
            with suppress(OSError):
                for name in (LOG, PLOT):
                    (folder / name).unlink(missing_ok=True)
                if not existed:
                    folder.rmdir()
        raise


def _train(
    pipeline: QwenImagePipeline,
    examples: Sequence[Example],
    settings: TrainingSettings,
    folder: Path,
    resume: bool,
    progress: ProgressCallback | None,
    on_step: Callable[[StepResult], None] | None,
    stop: Callable[[], bool],
) -> Outcome:
    """The run, after the checks."""
    parts, task = pipeline.components, "edit" if examples[0].sources else TASKS[pipeline.variant.task]
    pipeline.prepare()
    record = _record(pipeline, examples, settings)
    cache = folder / CACHE
    entries = encode_examples(
        pipeline, examples, task, settings.resolution, settings.caption_dropout > 0, cache, progress
    )
    dataset = Dataset(entries, settings.seed, settings.batch_size, settings.accumulate, settings.caption_dropout)
    samples = None
    if settings.sample_every:
        samples = Samples(
            pipeline, examples[0], settings.sample_prompts, settings.resolution, cache, seed=settings.seed
        )
    pipeline.release_encoders()

    trainer = _trainer(pipeline, dataset, settings, cache)
    _require_space(folder, trainer)
    done = last_checkpoint(folder / CHECKPOINTS) if resume else None
    if done is not None:
        load_checkpoint(done, trainer, record)
        logger.info("going on after step %d", trainer.step)
    files = _Files(folder, trainer, settings, record, pipeline)
    files.begin()
    if done is not None and trainer.step <= settings.steps:
        files.show()  # the run may have been cut right after its checkpoint
    painter = painter_of(trainable_of(pipeline), parts, trainer.network, progress) if samples else None
    checkpoint = done

    def after(result: StepResult) -> bool:
        nonlocal checkpoint
        files.log(result)
        if on_step is not None:
            on_step(result)
        stopping = stop() and result.step < settings.steps
        if samples and (result.step % settings.sample_every == 0 or result.step == settings.steps):
            files.sample(samples, painter)
        if result.step % settings.save_every == 0 or result.step == settings.steps or stopping:
            checkpoint = files.save()
        return not stopping

    try:
        trainer.run(settings.steps, after)
    except NotFinite as error:
        where = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint exists before it"
        raise NotFinite(f"{error}; {where}") from error
    except OutputError as error:
        where = f"the last checkpoint, {checkpoint}, is whole" if checkpoint else "no checkpoint exists yet"
        raise OutputError(f"{error}; {where}, and the run can be resumed", cause="cut run") from error
    if checkpoint is None or trainer.step > settings.steps:
        raise RequestError(f"{folder} has {trainer.step} steps already: ask for more steps")
    result = files.finish() if trainer.step == settings.steps else None
    return Outcome(result, checkpoint, trainer.step)


def _check(
    pipeline: QwenImagePipeline,
    examples: Sequence[Example],
    settings: TrainingSettings,
    folder: Path,
    resume: bool,
) -> None:
    """Raises RequestError for faults that can be found without reading a weight."""
    trainable_of(pipeline)
    if not examples:
        raise RequestError("there is nothing to train on: give at least one example")
    if settings.full and TRANSFORMER in pipeline.quantization.components:
        raise RequestError("quantized weights cannot be trained: quantize nothing, or train a LoRA")
    if settings.resolution % (multiple := pipeline.variant.size_multiple):
        raise RequestError(f"resolution is {settings.resolution}, but must be a multiple of {multiple} for this model")
    if not settings.full:
        check_lora(matrices(pipeline.transformer_config), settings.targets, settings.rank)
    for place in (folder, *(folder / name for name in (CHECKPOINTS, CACHE, SAMPLES))):
        sweep(place)
    try:
        there = folder.is_dir() and any(not is_from_macos(file.name) for file in folder.iterdir())
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {reason(error)}") from error
    folders, files = (CHECKPOINTS, CACHE, SAMPLES, "model"), (LOG, PLOT, "lora.safetensors")
    odd = [name for name in folders if os.path.lexists(folder / name) and not os.path.isdir(folder / name)]
    if odd := odd + [name for name in files if os.path.isdir(folder / name)]:
        raise RequestError(f"{folder} has a {odd[0]} that does not belong to a run: move it away, or name a new folder")
    if resume and not there:
        raise RequestError(f"{folder} holds no run to resume: begin a new one", cause="no run")
    if there and not resume:
        raise RequestError(f"{folder} is not empty: name a new folder, or resume the run in it", cause="earlier run")
    check_writable(folder / LOG, nbytes=1 << 20)


def _record(pipeline: QwenImagePipeline, examples: Sequence[Example], settings: TrainingSettings) -> dict[str, Any]:
    """Everything a run's numbers depend on, stored in its checkpoints."""
    parts = pipeline.components
    weights = parts.weights(TRANSFORMER)
    stored = [(spec.name, weights.stored(spec.name).tensor) for layer in weights.layers() for spec in layer]
    facts = [(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in stored]
    path = Path(pipeline.model).expanduser()
    return settings.record | {
        "model": str(path.resolve()) if path.is_dir() else pipeline.model,
        "revision": pipeline.revision,
        TRANSFORMER: hashlib.sha256(repr((facts, parts.config(TRANSFORMER))).encode()).hexdigest()[:16],
        "dtype": str(pipeline.dtype),
        "quantize": str(parts.quantization),
        "data": digest_of(examples),
        **({"ignore_profile": True} if profiles_are_ignored() else {}),
    }


def _trainer(pipeline: QwenImagePipeline, dataset: Dataset, settings: TrainingSettings, cache: Path) -> Trainer:
    """The trainer with its network, which is in memory from here on."""
    parts, config, trainable = pipeline.components, pipeline.transformer_config, trainable_of(pipeline)
    shift = training_shift(parts.scheduler_config) if settings.shift is None else settings.shift
    flow = FlowMatching(
        settings.timesteps, settings.logit_mean, settings.logit_std, shift=shift, weighting=settings.weighting,
        levels=parts.scheduler_config.num_train_timesteps,
    )  # fmt: skip
    loop = LoopSettings(settings.seed, pipeline.dtype, settings.ema)
    optimizer = Optimizer(
        Rate(settings.rate, settings.warmup, settings.schedule, settings.steps),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )
    weights, table, modulation = parts.weights(TRANSFORMER), None, None
    if settings.full:
        if any(weights.is_packed(spec.name) for spec in weights.specs("main") if spec.name.endswith(".weight")):
            raise RequestError(
                f"{pipeline.model} is quantized, which cannot be trained: use the model it was made from"
            )
        modulation = load_module(trainable.modulation(config), weights, "modulation", pipeline.dtype)
    else:
        drawn = _levels(dataset, settings, loop, flow)
        files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files)
        table = trainable.table(cache, weights, flow.sigmas, drawn, pipeline.dtype, parts.adapters, repr(files))
        mx.clear_cache()
    transformer = parts.network(TRANSFORMER)
    network = trainable.network(transformer, config, modulation, settings.checkpointing)
    if not settings.full:
        names = add_lora(transformer, matrices(config), settings.targets, settings.rank, settings.alpha, settings.seed)
    trainer = Trainer(network, dataset.batches, optimizer, flow, loop, table)
    count = sum(array.size for array in trainer.parameters.values())
    what = "all weights" if settings.full else f"a LoRA of rank {settings.rank} for {len(names)} matrices"
    logger.info("%d examples; training %s: %.3g million parameters", len(dataset), what, count / 1e6)
    return trainer


def _levels(dataset: Dataset, settings: TrainingSettings, loop: LoopSettings, flow: FlowMatching) -> Sequence[int]:
    """The noise levels that a run draws, or all where that is nearly the same."""
    if settings.steps * settings.batch_size * settings.accumulate > 3 * flow.levels:
        return range(flow.levels)
    return [
        level
        for step in range(settings.steps)
        for number, size in enumerate(dataset.batch_sizes(step))
        for level in loop.levels(flow, step, number, size).tolist()
    ]


def _require_space(folder: Path, trainer: Trainer) -> None:
    """Raises OutputError if the disk has no room for the checkpoints."""
    nbytes = sum(array.nbytes for array in trainer.state.values())
    check_writable(folder / "lora.safetensors", nbytes=(KEPT + 1) * nbytes)


class _Files:
    """The files of a run; every method raises OutputError if it cannot write."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        settings: TrainingSettings,
        record: dict[str, Any],
        pipeline: QwenImagePipeline,
    ):
        self._folder, self._trainer, self._settings, self._record = folder, trainer, settings, record
        self._pipeline = pipeline
        self._losses: list[tuple[int, float]] = []
        self._sample: Path | None = None
        self._since = time.monotonic()

    def begin(self) -> None:
        """Reads the log of the steps that are done, and drops later lines."""
        path, lines = self._folder / LOG, []
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            try:
                row = json.loads(line.decode())
                step, loss = int(row["step"]), float(row["loss"])
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                continue  # half a line of a run that was cut, or damaged
            if step <= self._trainer.step and math.isfinite(loss):
                lines.append(line)
                self._losses.append((step, loss))
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, b"".join(line + b"\n" for line in lines))
        generated = sorted((self._folder / SAMPLES).glob("step-*.png"))
        self._sample = generated[-1] if generated else None
        self._since = time.monotonic()

    def log(self, result: StepResult) -> None:
        """Adds a step to the log."""
        now = time.monotonic()
        row = {**result._asdict(), "seconds": round(now - self._since, 4), "peak_bytes": mx.get_peak_memory()}
        self._since = now
        self._losses.append((result.step, result.loss))
        try:
            with (self._folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._folder / LOG}: {reason(error)}") from error

    def sample(self, samples: Samples, painter: QwenImagePipeline) -> None:
        """Generates with the weights as they are."""
        path = self._folder / SAMPLES / f"step-{self._trainer.step:06}.png"
        path.unlink(missing_ok=True)  # of an interrupted run
        try:
            with self._trainer.weights():
                self._sample = samples.generate(painter, path)
        except OutputError:
            raise
        except QwenImageError as error:  # training may recover, even where an image fails
            if getattr(error, "fatal", False):  # but not from a GPU that this process can no longer use
                raise
            logger.warning("no samples after step %d: %s", self._trainer.step, error)
        self._since = time.monotonic()

    def save(self) -> Path:
        """Writes a checkpoint, the LoRA of this step and the plot; returns the checkpoint.

        Raises:
            NotFinite: the weights are not finite; nothing is written.
        """
        if not self._trainer.is_finite:
            raise NotFinite(f"the weights are not finite after step {self._trainer.step}: try a lower learning rate")
        checkpoint = save_checkpoint(self._folder / CHECKPOINTS, self._trainer, self._record)
        self.show()
        return checkpoint

    def show(self) -> None:
        """Writes the files that go with a checkpoint: the LoRA of its step, and the plot."""
        if not self._settings.full:
            self._save_lora(self._folder / f"lora-{self._trainer.step:06}.safetensors")
        plot_run(self._folder / PLOT, self._losses, self._sample)
        self._since = time.monotonic()

    def finish(self) -> Path:
        """Writes the result and returns its path."""
        if self._settings.full:
            trainer = self._trainer
            return save_model(self._folder / "model", self._pipeline.components, trainer.average or trainer.parameters)
        return self._save_lora(self._folder / "lora.safetensors")

    def _save_lora(self, path: Path) -> Path:
        settings = self._settings
        record = {"steps": self._trainer.step} | {k: v for k, v in self._record.items() if k not in ("data", "steps")}
        save_lora(path, self._trainer.parameters, settings.rank, settings.scale_numerator, record)
        return path
