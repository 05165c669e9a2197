"""The training loop: batches in, parameters out; deterministic in seed and step, so that it can stop and resume.

Independent of files and data: a step's batches are a function of the step, and every random draw has its own key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import QwenImageError
from ..gpu import all_finite, finish
from .loss import FlowMatching, key_of
from .network import Batch
from .optimizers import Optimizer, Parameters
from .seam import Table

# A step's number, from 0, to its batches.
Batches = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True)
class LoopSettings:
    """How a step is computed.

    Attributes:
        seed: of noise and noise levels.
        dtype: of all products; parameters, gradients and the optimizer's state are fp32.
        ema: decay of the parameters' moving average; None keeps none.
    """

    seed: int = 0
    dtype: mx.Dtype = mx.float32
    ema: float | None = None

    def levels(self, flow: FlowMatching, step: int, number: int, count: int) -> mx.array:
        """The noise levels of a step's batch, as uint32 indices (count,)."""
        return flow.levels_drawn(key_of(self.seed, "levels", step, number), count)


class StepResult(NamedTuple):
    """The result of a step; `step` is the number of steps done."""

    step: int
    loss: float
    gradient_norm: float
    rate: float


class NotFinite(QwenImageError):
    """The loss or its gradient is not finite; the parameters are those before the step."""


class Trainer:
    """Trains the trainable parameters of a network.

    Args:
        network: that of the generation (`Trainable.network`); its trainable parameters become fp32.
        batches: the batches of each step; several are accumulated, with equal weight for each sample.
        optimizer: updates the parameters.
        flow: the objective.
        settings: how a step is computed.
        table: the modulation of noise levels, if it is not trained.
    """

    def __init__(
        self,
        network: Any,
        batches: Batches,
        optimizer: Optimizer,
        flow: FlowMatching,
        settings: LoopSettings | None = None,
        table: Table | None = None,
    ):
        assert (table is None) == ("modulation" in network), "the modulation is either trained or in a table"
        self.network: Any = network
        self.flow: FlowMatching = flow
        self.settings: LoopSettings = settings or LoopSettings()
        self.step: int = 0
        self.parameters: Parameters = {
            name: array.astype(mx.float32) for name, array in tree_flatten(network.trainable_parameters())
        }
        self.average = dict(self.parameters) if self.settings.ema is not None else None
        self._batches, self._optimizer, self._table = batches, optimizer, table
        self._sigmas = flow.sigmas
        self._gradients = mx.value_and_grad(self._loss)
        optimizer.init(self.parameters)
        mx.eval(self.parameters)
        self._put(self.parameters)

    def run(self, until: int, on_step: Callable[[StepResult], bool | None] | None = None) -> None:
        """Trains until step `until`, or until `on_step` returns False.

        Raises:
            NotFinite: a loss or gradient is not finite; that step is not taken.
        """
        while self.step < until:
            result = self.take_step()
            if on_step is not None and on_step(result) is False:
                break

    def take_step(self) -> StepResult:
        """One step; raises NotFinite and changes nothing if it cannot be taken."""
        loss, gradients = self.gradients(self.step)
        gradients, norm = self._optimizer.clip(gradients)
        finish(norm)
        if not math.isfinite(loss + norm.item()):
            raise NotFinite(
                f"the loss is {loss:g} and its gradient's norm {norm.item():g} in step {self.step + 1}: "
                "try a lower learning rate"
            )
        rate = self._optimizer.rate(self.step)
        parameters = self._optimizer.update(self.step, self.parameters, gradients)
        average = self.average
        if average is not None:
            keep = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            average = {name: keep * average[name] + (1 - keep) * array for name, array in parameters.items()}
        finish(parameters, average, self._optimizer.state)
        self.parameters, self.average, self.step = parameters, average, self.step + 1
        self._put(parameters)
        return StepResult(self.step, loss, norm.item(), rate)

    def gradients(self, step: int) -> tuple[float, Parameters]:
        """The loss of a step, and its gradient by every parameter, evaluated; not clipped."""
        batches = self._batches(step)
        samples = sum(map(len, batches))
        total, gradients = 0.0, None
        for number, batch in enumerate(batches):
            levels, noise = self.draws(step, number, batch)
            rows = None if self._table is None else self._table(levels.tolist())
            loss, found = self._gradients(
                self.parameters, batch.latents, noise, self._sigmas[levels], batch.text.astype(self.settings.dtype),
                self.network.rotary(batch), batch.references, rows,
            )  # fmt: skip
            self._put(self.parameters)
            share = len(batch) / samples
            found = {
                name: share * gradient if gradients is None else gradients[name] + share * gradient
                for name, gradient in found.items()
            }
            finish(loss, found)
            gradients, total = found, total + share * loss.item()
        return total, gradients

    def draws(self, step: int, number: int, batch: Batch) -> tuple[mx.array, mx.array]:
        """Noise levels (B,), as uint32 indices, and fp32 noise (B, N, C) of a step's batch."""
        noise = mx.random.normal(batch.latents.shape, key=key_of(self.settings.seed, "noise", step, number))
        return self.settings.levels(self.flow, step, number, len(batch)), noise

    def _loss(
        self,
        parameters: Parameters,
        latents: mx.array,
        noise: mx.array,
        sigmas: mx.array,
        text: mx.array,
        rotary: Any,
        references: mx.array | None,
        rows: Any,
    ) -> mx.array:
        dtype = self.settings.dtype
        self._put({name: array.astype(dtype) for name, array in parameters.items()})
        velocity = self.network(
            self.flow.noisy(latents, noise, sigmas).astype(dtype),
            text,
            sigmas,
            rotary,
            None if references is None else references.astype(dtype),
            rows,
        )
        return self.flow.loss(velocity, latents, noise, sigmas).mean()

    def _put(self, parameters: Mapping[str, mx.array]) -> None:
        self.network.update(tree_unflatten([*parameters.items()]))

    @contextmanager
    def weights(self, average: bool = True) -> Iterator[Any]:
        """The network with the averaged parameters, if there are any, inside the `with`."""
        dtype = self.settings.dtype
        found = self.average if average and self.average is not None else self.parameters
        self._put({name: array.astype(dtype) for name, array in found.items()})
        try:
            yield self.network
        finally:
            self._put(self.parameters)

    # To stop and resume ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> Parameters:
        """Everything that changes except the step, by name."""
        parts = {"parameters": self.parameters, "optimizer": self._optimizer.state, "average": self.average or {}}
        return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    @property
    def is_finite(self) -> bool:
        """Whether everything in a checkpoint is finite."""
        return all_finite(*self.state.values())

    def restore(self, step: int, state: Mapping[str, mx.array]) -> None:
        """Restores the trainer after `step` steps from its `state` at that step.

        Raises:
            KeyError: the state belongs to a different network or optimizer.
        """
        parts: dict[str, Parameters] = {"parameters": {}, "optimizer": {}, "average": {}}
        for name, array in state.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        names = {name: array.shape for name, array in self.parameters.items()}
        for part in ("parameters", *(["average"] if self.average is not None else [])):
            if {name: array.shape for name, array in parts[part].items()} != names:
                raise KeyError(part)
        self._optimizer.restore(self.parameters, parts["optimizer"])
        self.parameters = {name: parts["parameters"][name] for name in self.parameters}
        if self.average is not None:
            self.average = {name: parts["average"][name] for name in self.average}
        self.step: int = step
        mx.eval(self.parameters, self.average, self._optimizer.state)
        self._put(self.parameters)
