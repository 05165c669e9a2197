"""qwen-image-mlx train: fine-tune a model with a LoRA, or train all of its weights."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import RequestError
from ..training.settings import SCHEDULES, TARGETS, TASKS, TIMESTEPS, WEIGHTINGS, TrainingSettings
from ..variants import DEFAULT_EDIT_MODEL, DEFAULT_LAYERED_MODEL, DEFAULT_MODEL
from .config import config_options
from .flags import add_options
from .signals import ENDS, handle_signals

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..pipeline.progress import Progress
    from ..training.loop import StepResult

DESCRIPTION = """\
Fine-tune a model with a LoRA, which --lora and diffusers read, or train all of its weights with --full.

DIR holds images with captions in .txt files of the same names, or a metadata.jsonl with a line for each example:
  t2i      {"image": "a.png", "caption": "a red fox"}
  edit     {"source": "a.png", "target": "b.png", "instruction": "make it blue"}   (several sources as a list)
  layered  {"image": "a.png", "layers": ["0.png", "1.png"], "caption": "a fox"}     (back to front)

Images and captions are encoded once; then only the transformer is in memory. --quantize 4 keeps its
frozen weights in 4 bits; --checkpointing saves memory by computing blocks again. OUT gets checkpoints, samples,
log.jsonl, plot.png and at the end lora.safetensors, or with --full the folder model. Ctrl-C saves and stops; --resume
continues to the same numbers."""

_DEFAULT_MODELS = {"t2i": DEFAULT_MODEL, "edit": DEFAULT_EDIT_MODEL, "layered": DEFAULT_LAYERED_MODEL}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags; those of `TrainingSettings` have its names, and its defaults where they are None."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model with your own images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = {field.name: field.default for field in fields(TrainingSettings)}
    add("--data", required=True, metavar="DIR", help="training examples: a folder, or a .jsonl file")
    add("--output", "-o", required=True, metavar="OUT", help="folder of the run")
    add("--task", choices=_DEFAULT_MODELS, help="the kind of model that is trained (default: the task of --model)")
    add_options(parser, "train")
    add("--steps", type=int, required=True, metavar="N", help="optimizer steps")
    add("--rank", type=int, metavar="R", help=f"LoRA rank (default: {default['rank']})")
    add("--alpha", type=float, metavar="A", help="LoRA scale is A / R (default: R)")
    add("--targets", metavar="T", help=f"matrices it changes: {', '.join(TARGETS)}, or ends of names, separated by "
        f"commas (default: {default['targets']})")  # fmt: skip
    add("--full", action="store_true", default=None, help="train all weights instead of a LoRA")
    add("--learning-rate", type=float, metavar="L", help="learning rate (default: 1e-4, with --full 1e-5)")
    add("--warmup", type=int, metavar="N", help="steps in which the rate rises (default: 0)")
    add("--schedule", choices=SCHEDULES, help=f"learning rate schedule (default: {default['schedule']})")
    add("--batch-size", type=int, metavar="B", help="samples computed together (default: 1)")
    add("--accumulate", type=int, metavar="N", help="B x N samples a step (default: 1)")
    add("--weight-decay", type=float, metavar="W", help=f"(default: {default['weight_decay']})")
    add("--timesteps", choices=TIMESTEPS, help=f"density of the noise levels (default: {default['timesteps']})")
    add("--logit-mean", type=float, metavar="M", help="mean of logit_normal (default: 0)")
    add("--logit-std", type=float, metavar="S", help="standard deviation of logit_normal (default: 1)")
    add("--shift", type=float, metavar="S", help="moves the noise levels towards noise (default: the scheduler's)")
    add("--weighting", choices=WEIGHTINGS, help=f"weighting of errors by noise level (default: {default['weighting']})")
    add("--resolution", type=int, metavar="P", help=f"images have about P x P pixels (default: "
        f"{default['resolution']})")  # fmt: skip
    add("--caption-dropout", type=float, metavar="P", help="share of samples without their caption (default: 0)")
    add("--checkpointing", action="store_true", default=None, help="compute each block again for the gradient: slower, "
        "in a fraction of the memory")  # fmt: skip
    add("--ema", type=float, metavar="D", help="with --full, save a moving average of this decay")
    add("--seed", "-s", type=int, metavar="N", help="seed of all random draws (default: 0)")
    add("--save-every", type=int, metavar="N", help=f"steps between checkpoints (default: {default['save_every']})")
    add("--sample-every", type=int, metavar="N", help="steps between sample images (default: none)")
    add("--sample-prompt", dest="sample_prompts", action="append", metavar="P", help="prompt of the sample images; "
        "repeat for more (default: the first caption)")  # fmt: skip
    add("--resume", action="store_true", help="continue from OUT's last checkpoint")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints the path of the result."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    names = {field.name for field in fields(TrainingSettings)}
    chosen = {name: value for name, value in given.items() if name in names}
    settings = TrainingSettings(**chosen | {"sample_prompts": tuple(chosen.get("sample_prompts", ()))})
    if settings.sample_prompts and not settings.sample_every:
        raise RequestError("--sample-prompt needs --sample-every")
    kind = given.get("task", "t2i")
    options = {**config_options(arguments, f"train --task {kind}"), **given}

    from ..files import named_path

    data, folder = named_path(arguments.data, "--data"), named_path(arguments.output, "--output")
    if given.get("task"):
        _read(data, given["task"])  # before the model is opened

    from ..runtime.session import Session
    from ..training.run import train
    from .console import ProgressBars, messages

    with messages(), ProgressBars() as bars, _LossLine(settings.steps) as line, _Interrupt() as interrupt:

        def tell(progress: Progress) -> None:
            line.tell(progress) if interrupt.gently else bars(progress)

        def on_step(result: StepResult) -> None:
            bars.close()
            interrupt.gently = True
            line.show(result)

        pipeline = Session.open(options, _DEFAULT_MODELS[kind], tell).pipeline
        tasks = [TASKS[task] for task in pipeline.variant.tasks]
        task = given.get("task", tasks[0])
        if task not in tasks:
            raise RequestError(f"{pipeline.model} is trained for {' or '.join(tasks)}, not for {task}")
        examples = _read(data, task)
        outcome = train(
            pipeline, examples, settings, folder, resume=arguments.resume,
            progress=tell, on_step=on_step, stop=lambda: interrupt.signal is not None,
        )  # fmt: skip
        line.close()
        if outcome.result is None:
            print(f"stopped after {outcome.steps} steps, saved as {outcome.checkpoint}", file=sys.stderr)
            interrupt.end()
        print(outcome.result, flush=True)


def _read(data: Path, task: str) -> list:
    from ..training.examples import read_examples

    return read_examples(data, task)


class _LossLine:
    """The live line: steps, their speed, the loss and its moving average."""

    def __init__(self, steps: int):
        self._steps, self._average, self._weight = steps, 0.0, 0.0
        self._bar: tqdm | None = None
        self._said = ""

    def show(self, result: StepResult) -> None:
        """After a step."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=self._steps, initial=result.step - 1, desc="train", unit="step", dynamic_ncols=True,
                             file=sys.stderr)  # fmt: skip
        self._average = 0.97 * self._average + 0.03 * result.loss
        self._weight = 0.97 * self._weight + 0.03
        self._said = f"loss {result.loss:.4f}, mean {self._average / self._weight:.4f}, rate {result.rate:.2g}"
        self._bar.set_postfix_str(self._said, refresh=False)
        self._bar.update(1)

    def tell(self, progress: Progress) -> None:
        """While a sample is generated."""
        if self._bar is not None and progress.stage == "denoise":
            self._bar.set_postfix_str(f"generating a sample, step {progress.step} of {progress.total}")

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._said)
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _LossLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Interrupt:
    """Handles signals that end a command: at once before training, else after the current step; a second one at once.

    Attributes:
        gently: whether there is something to save.
        signal: the signal that was received; None if none was.
    """

    def __init__(self) -> None:
        self.gently = False
        self.signal: int | None = None
        self._handled = handle_signals(dict.fromkeys(ENDS, self._handle))

    def end(self) -> NoReturn:
        """Raises the exception of the signal that was received."""
        raise ENDS[self.signal]

    def _handle(self, number: int, frame: Any) -> None:
        at_once = self.signal is not None or not self.gently
        self.signal = number
        if at_once:
            self.end()
        print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    def __enter__(self) -> _Interrupt:
        self._handled.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handled.__exit__(*error)
