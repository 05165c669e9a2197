"""AdamW and Muon over parameters by name, clipped by their common norm, at a learning rate with warm-up and decay.

Parameters, gradients and state are flat dictionaries of fp32 arrays. Sources: Loshchilov and Hutter, Decoupled Weight
Decay Regularization; K. Jordan, Muon; PyTorch's AdamW for its bias correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as optim

from ..errors import RequestError
from .settings import SCHEDULES

Parameters = dict[str, mx.array]


@dataclass(frozen=True)
class Rate:
    """A learning rate over the steps of a run.

    Attributes:
        peak: reached after the warm-up.
        warmup: steps in which it rises from 0.
        schedule: "constant", or falling to 0 at the last step: "cosine" or "linear".
        steps: the run's length.
    """

    peak: float
    warmup: int = 0
    schedule: str = "constant"
    steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise RequestError(f"schedule is {self.schedule!r}, but must be one of {', '.join(SCHEDULES)}")
        if not 0 < self.peak < math.inf:
            raise RequestError(f"learning rate is {self.peak}, but must be a positive number")

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        fall = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
        return self.peak * fall[self.schedule]


class Optimizer:
    """Muon for some parameters, AdamW for all others.

    Args:
        rate: AdamW's learning rate.
        weight_decay: decoupled, for both.
        betas: AdamW's.
        clip: maximum norm of all gradients together; None does not clip.
        muon: given a name and its array, whether Muon takes it; None gives all to AdamW.
        muon_rate: Muon's learning rate.
        momentum: Muon's.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = 1.0,
        muon: Callable[[str, mx.array], bool] | None = None,
        muon_rate: Rate | None = None,
        momentum: float = 0.95,
    ):
        assert (muon is None) == (muon_rate is None), "Muon needs its own learning rate"
        self._clip, self._decay, self._betas, self._momentum = clip, weight_decay, betas, momentum
        self._takes = muon or (lambda name, array: False)
        self._rates = {"adamw": rate, "muon": muon_rate}
        self._rules: dict[str, optim.Optimizer] = {}
        self._names: dict[str, list[str]] = {}

    def init(self, parameters: Mapping[str, mx.array]) -> None:
        """Resets the state for these parameters."""
        muon = [name for name, array in parameters.items() if self._takes(name, array)]
        self._names = {"adamw": [name for name in parameters if name not in {*muon}], "muon": muon}
        self._rules = {
            "adamw": optim.AdamW(0.0, betas=[*self._betas], weight_decay=self._decay, bias_correction=True),
            "muon": optim.Muon(0.0, momentum=self._momentum, weight_decay=0.0),
        }
        for rule, names in self._names.items():
            self._rules[rule].init({name: parameters[name] for name in names})

    def update(self, step: int, parameters: Parameters, gradients: Parameters) -> Parameters:
        """The parameters after a step, lazily; the state is updated."""
        changed = {}
        for rule, names in self._names.items():
            if not names:
                continue
            optimizer, rate = self._rules[rule], self._rates[rule](step)
            optimizer.learning_rate = rate
            before = {name: parameters[name] for name in names}
            if rule == "muon" and self._decay:
                before = {name: array * (1 - rate * self._decay) for name, array in before.items()}
            changed |= optimizer.apply_gradients({name: gradients[name] for name in names}, before)
        return {name: changed[name] for name in parameters}

    def clip(self, gradients: Parameters) -> tuple[Parameters, mx.array]:
        """The gradients clipped to the limit, and their original norm, fp32 ()."""
        norm = mx.sqrt(sum(mx.square(gradient).sum() for gradient in gradients.values()))
        if self._clip is None:
            return gradients, norm
        factor = mx.minimum(self._clip / (norm + 1e-6), 1.0)
        return {name: factor * gradient for name, gradient in gradients.items()}, norm

    def rate(self, step: int) -> float:
        """AdamW's learning rate in a step."""
        return self._rates["adamw"](step)

    @property
    def state(self) -> Parameters:
        """Everything needed to resume, by name."""
        found = {}
        for rule, names in self._names.items():
            state = self._rules[rule].state
            found[f"{rule}/step"] = state["step"]
            found |= {f"{rule}/{name}/{part}": array for name in names for part, array in state[name].items()}
        return found

    def restore(self, parameters: Mapping[str, mx.array], state: Mapping[str, mx.array]) -> None:
        """Restores a state; raises KeyError if it lacks an array of these parameters, or one has a different shape."""
        self.init(parameters)
        for rule, names in self._names.items():
            mine = self._rules[rule].state
            step = state[f"{rule}/step"]
            if (step.shape, step.dtype) != ((), mine["step"].dtype):
                raise KeyError(f"{rule}/step is not one whole number")
            mine["step"] = step
            for name in names:
                found = {part: state[f"{rule}/{name}/{part}"] for part in mine[name]}
                if any(found[part].shape != mine[name][part].shape for part in found):
                    raise KeyError(f"{rule}/{name} has a different shape")
                mine[name] = found
