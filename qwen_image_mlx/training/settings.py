"""The settings of a training run, validated once; importable without MLX, for the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RequestError
from ..pipeline.parameters import check_seed

# The training task of each kind of model, by the task of its variant.
TASKS = {"generate": "t2i", "edit": "edit", "decompose": "layered"}
TIMESTEPS = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
SCHEDULES = ("constant", "cosine", "linear")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = (
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
)
TARGETS: dict[str, tuple[str, ...]] = {"attention": ATTENTION, "all": ATTENTION + MLP}
_MAX_STEPS = 10_000_000
_MAX_SAMPLES = 10_000  # of a batch, and batches of a step


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is fine-tuned.

    Attributes:
        steps: total optimizer steps.
        rank: LoRA rank.
        alpha: the LoRA is scaled by alpha / rank; None is rank.
        targets: which matrices the LoRA changes: "attention", "all", or ends of their names, separated by commas.
        full: train all weights instead of a LoRA.
        learning_rate: after the warm-up; None is 1e-4 for a LoRA and 1e-5 for all weights.
        warmup: steps in which the learning rate rises.
        schedule: learning rate after the warm-up:  "constant", "cosine" or "linear".
        batch_size: samples that are computed together, if their shapes are the same.
        accumulate: batches in a step.
        weight_decay: decoupled.
        clip: maximum norm of all gradients together.
        timesteps: density of the noise levels: "uniform", "logit_normal" or "mode".
        logit_mean, logit_std: of "logit_normal".
        shift: moves all noise levels towards noise; None is the scheduler's own, independent of size.
        weighting: of errors by noise level: "none", "sigma_sqrt" or "cosmap".
        resolution: images are trained on at about resolution² pixels, at their aspect.
        caption_dropout: share of samples that are trained without their caption.
        checkpointing: recompute the inside of each block instead of keeping it: slower, with a fraction of the memory.
        ema: decay of the average of all weights that --full saves; None saves the last ones.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
        sample_every: steps between sample images; 0 generates none.
        sample_prompts: their prompts; without any, the first example's caption.

    Raises:
        RequestError: a value is out of range; the message says which and what is allowed.
    """

    steps: int
    rank: int = 16
    alpha: float | None = None
    targets: str = "attention"
    full: bool = False
    learning_rate: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    batch_size: int = 1
    accumulate: int = 1
    weight_decay: float = 0.01
    clip: float = 1.0
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | None = None
    weighting: str = "none"
    resolution: int = 1024
    caption_dropout: float = 0.0
    checkpointing: bool = False
    ema: float | None = None
    seed: int = 0
    save_every: int = 250
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, _MAX_STEPS), ("rank", 1, None), ("batch_size", 1, _MAX_SAMPLES),
            ("accumulate", 1, _MAX_SAMPLES), ("save_every", 1, None), ("warmup", 0, None), ("sample_every", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise RequestError(f"{_word(name)} is {value!r}, but must be a whole number of at least {low}")
            if high is not None and value > high:
                raise RequestError(f"{_word(name)} is {value}, but at most {high:,} work")
        for name in ("alpha", "learning_rate", "clip", "logit_std", "shift"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise RequestError(f"{_word(name)} is {value}, but must be a positive number")
        for name, allowed in (("schedule", SCHEDULES), ("timesteps", TIMESTEPS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise RequestError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")
        if not 0 <= self.caption_dropout <= 1:
            raise RequestError(f"caption dropout is {self.caption_dropout}, but must be from 0 to 1")
        if not 0 <= self.weight_decay < math.inf or not math.isfinite(self.logit_mean):
            raise RequestError(f"weight decay is {self.weight_decay} and logit mean {self.logit_mean}: give numbers")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RequestError(f"ema is {self.ema}, but must be above 0 and below 1")
        if self.ema is not None and not self.full:
            raise RequestError("ema is for training all weights, not a LoRA", cause="ema")
        if not isinstance(self.resolution, int) or not 64 <= self.resolution <= 2048 or self.resolution % 16:
            raise RequestError(f"resolution is {self.resolution!r}, but must be a multiple of 16 from 64 to 2048")
        check_seed(self.seed)
        for prompt in self.sample_prompts:
            if not is_text(prompt):
                raise RequestError(f"the sample prompt {prompt!r:.80} is not valid text")

    @property
    def rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate if self.learning_rate is not None else 1e-5 if self.full else 1e-4

    @property
    def scale_numerator(self) -> float:
        """alpha."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def record(self) -> dict[str, Any]:
        """The settings a run's numbers depend on; a run is resumed only with the same.

        Saving and samples are left out, and so are the steps where the rate does not depend on them.
        """
        free = {"save_every", "sample_every", "sample_prompts"} | ({"steps"} if self.schedule == "constant" else set())
        free |= {"rank", "alpha", "targets"} if self.full else {"ema"}
        return {name: value for name, value in asdict(self).items() if name not in free} | {"learning_rate": self.rate}


def _word(name: str) -> str:
    return name.replace("_", " ")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8, the input of tokenizers: without lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
