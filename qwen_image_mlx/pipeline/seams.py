"""The three seams at which generations of the model differ; `registry.py` finds the two that compute.

`LatentSpace` (sampling/latents.py) is data. A `ConditionEncoder` is made once for a checkpoint; a `Denoiser` for one
image, from everything that is known before its first step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..models.layers import OnLayer
from ..names import CaptionLanguage
from .conditioning import Reference
from .control import in_window
from .costs import Costs
from .reporter import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

    from .components import Components


# Gives what the transformer adds after its blocks in the evaluation that was entered.
Hints = Callable[[], "list[Callable[..., Any]]"]


def no_hints() -> list[Callable[..., Any]]:
    """Nothing."""
    return []


@dataclass(frozen=True)
class ControlInput:
    """A ControlNet's part in one image.

    Attributes:
        role: the name of its component.
        tokens: the encoded control image, packed (1, N, condition channels), fp32.
        scale: factor of what it adds.
        start, end: the part of the evaluations, from 0 to 1, in which it runs.
    """

    role: str
    tokens: mx.array
    scale: float
    start: float
    end: float

    def runs(self, evaluation: int, evaluations: int) -> bool:
        """Whether it has an effect in an evaluation."""
        return self.scale != 0 and in_window(self.start, self.end, evaluation, evaluations)


@dataclass(frozen=True)
class Conditions:
    """Everything that one image depends on except its noise; a second conditioner adds a field.

    Attributes:
        branches: encoder states (1, L, C) of the prompt and, with guidance, of the negative prompt; or only those that
            are computed here.
        references: the encoded reference images, in order.
        frames: images that are generated together: 1, or layers and the whole.
        rows, columns: of a frame's tokens.
        sigmas: the noise levels at which the solver asks for a velocity: float32, in their order.
        controls: what steers the image by other images.
        keeps_prefix: whether what text and references contribute may be kept between steps.
        prompt_states: the prompt's, where `branches` has only the negative prompt's; controls may see them in both.
    """

    branches: tuple[mx.array, ...]
    references: tuple[Reference, ...]
    frames: int
    rows: int
    columns: int
    sigmas: np.ndarray
    controls: tuple[ControlInput, ...] = ()
    keeps_prefix: bool = True
    prompt_states: mx.array | None = None

    @property
    def prompt(self) -> mx.array:
        """The states of the prompt, also where only the negative prompt's branch is computed."""
        return self.branches[0] if self.prompt_states is None else self.prompt_states

    @property
    def turns(self) -> set[int]:
        """The evaluations in which other controls run than in the one before."""
        count = len(self.sigmas)
        running = [[control.runs(n, count) for control in self.controls] for n in range(count)]
        return {n for n in range(1, count) if running[n] != running[n - 1]}


class ControlBranch(Protocol):
    """What one control adds to an image's tokens.

    Made from (components, conditions, its `ControlInput`, what its generation's denoiser gives it, report).
    """

    def hint(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Callable[..., Any]:
        """What is added after each block in one evaluation, a function that the generation's transformer calls.

        Args:
            latents: packed latents (1, N, C) of the target.
            evaluation: index into `Conditions.sigmas`.
            branches: how many of the branches run, from the first on; None is all.
        """

    @staticmethod
    def kept_values(config: Any, evaluations: int, tokens: int, branches: int) -> int:
        """The number of values, in the model's dtype, that it keeps; the memory plan counts them.

        Args:
            config: of the ControlNet.
            evaluations: the number of noise levels.
            tokens: of the target.
            branches: 1, or 2 with guidance.
        """


class Controls:
    """The controls of one image that have an effect.

    Args:
        components, conditions, report: as in `DenoiserClass`.
        steered: what the generation's denoiser gives to its `ControlBranch`es.
    """

    def __init__(self, components: Components, conditions: Conditions, steered: Any, report: Reporter):
        self._evaluations = len(conditions.sigmas)
        self._branches: list[tuple[ControlInput, ControlBranch]] = [
            (control, components.control(control.role)(components, conditions, control, steered, report))
            for control in conditions.controls
            if any(control.runs(evaluation, self._evaluations) for evaluation in range(self._evaluations))
        ]

    def entered(self, latents: mx.array, evaluation: int, branches: int | None) -> Hints:
        """The hints of an evaluation, computed when its first block runs: none where all blocks are left out."""

        @cache
        def hints() -> list[Callable[..., Any]]:
            return [
                branch.hint(latents, evaluation, branches)
                for control, branch in self._branches
                if control.runs(evaluation, self._evaluations)
            ]

        return hints


class Hidden(Protocol):
    """The streams of a pass between two blocks; all but the targets is a model's own."""

    @property
    def targets(self) -> Sequence[mx.array]:
        """The target (1, N, D) of each branch."""

    def with_targets(self, targets: Sequence[mx.array]) -> Any:
        """The same with other targets."""


class Denoiser(Protocol):
    """The velocity of one image's latents. It computes whatever is equal in all steps when it is made."""

    def velocities(
        self, latents: mx.array, evaluation: int, on_layer: OnLayer | None = None, branches: int | None = None
    ) -> Sequence[mx.array]:
        """The velocity of each branch, (1, N, C), in the model's dtype.

        Args:
            latents: packed latents (1, N, C) of the target.
            evaluation: index into `Conditions.sigmas`.
            on_layer: called after each layer with the arrays it made.
            branches: how many of the branches, from the first on; None is all.
        """


class DividedDenoiser(Denoiser, Protocol):
    """A denoiser whose pass can be taken in parts, so that a step cache leaves blocks out.

    `velocities` is `enter`, then `run` through all blocks, then `leave`. `hidden` is what the part before returned.
    """

    def enter(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Any:
        """What enters the first block: `Hidden`; the arguments are those of `velocities`."""

    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None = None) -> Any:
        """`Hidden` after some consecutive blocks."""

    def leave(self, hidden: Any, evaluation: int) -> Sequence[mx.array]:
        """The velocity of each branch, from `Hidden` after the last block."""

    def signal(self, hidden: Any, evaluation: int) -> mx.array:
        """The first branch's target (1, N, D) as the first block's attention takes it, normed and modulated."""

    def agreed(self, skips: bool) -> bool:
        """Whether blocks are left out, decided once for all processes that compute this image."""


class PassInParts(ABC):
    """What every `DividedDenoiser` shares: a pass is three parts."""

    def velocities(
        self, latents: mx.array, evaluation: int, on_layer: OnLayer | None = None, branches: int | None = None
    ) -> Sequence[mx.array]:
        """As `Denoiser.velocities`."""
        hidden = self.enter(latents, evaluation, branches)
        return self.leave(self.run(hidden, evaluation, slice(None), on_layer), evaluation)

    @abstractmethod
    def enter(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Any:
        """As `DividedDenoiser.enter`."""

    @abstractmethod
    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None = None) -> Any:
        """As `DividedDenoiser.run`."""

    @abstractmethod
    def leave(self, hidden: Any, evaluation: int) -> Sequence[mx.array]:
        """As `DividedDenoiser.leave`."""


class ControlledDenoiser(PassInParts):
    """What every generation's `DividedDenoiser` shares: controls add to its blocks.

    Args:
        controls: those of the image.
    """

    def __init__(self, controls: Controls):
        self._controls = controls
        self._hints: Hints = no_hints

    def enter(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Any:
        """As `DividedDenoiser.enter`."""
        self._hints = self._controls.entered(latents, evaluation, branches)
        return self._enter(latents, branches)

    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None = None) -> Any:
        """As `DividedDenoiser.run`."""
        return self._run(hidden, evaluation, blocks, on_layer, self._hints())

    def agreed(self, skips: bool) -> bool:
        """As `DividedDenoiser.agreed`: this process decides."""
        return skips

    @abstractmethod
    def _enter(self, latents: mx.array, branches: int | None) -> Any:
        """What enters the first block."""

    @abstractmethod
    def _run(
        self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None, hints: list[Callable[..., Any]]
    ) -> Any:
        """The streams after some blocks, with hints added."""


class DenoiserClass(Protocol):
    """Makes the `Denoiser` of an image."""

    @property
    def costs(self) -> Mapping[str, Costs]:
        """The memory that its generation takes while it works, encoders and autoencoder included, by backend."""

    @property
    def keeps_prefix(self) -> bool:
        """Whether it can keep what text and references contribute, so that they run in the first step alone."""

    def __call__(self, components: Components, conditions: Conditions, report: Reporter) -> Denoiser:
        """Prepares an image.

        Args:
            components: the checkpoint's components; the transformer is loaded. `Components.kept` is for results that a
                later image with the same conditions may use.
            conditions: what the image depends on.
            report: receives progress of long work.

        Raises:
            RequestError: the conditions do not fit the model.
        """

    def check(self, components: Components, conditions: Conditions) -> None:
        """Raises RequestError if the conditions do not fit the model, before anything is loaded."""

    def kept_values(self, config: Any, evaluations: int, prefix_tokens: int, branches: int) -> int:
        """The number of values, in the model's dtype, that it keeps from step to step; the memory plan counts them.

        Args:
            config: of the transformer.
            evaluations: the number of calls of `velocities`.
            prefix_tokens: tokens of prompt and references.
            branches: 1, or 2 with guidance.
        """

    def pass_flop(self, config: Any, target_tokens: int, prefix_tokens: int) -> float:
        """Floating point operations of one pass after the first, in products and attention.

        Args:
            config: of the transformer.
            target_tokens: of all frames.
            prefix_tokens: tokens of prompt and references.
        """


@dataclass(frozen=True)
class TrainedDenoisers:
    """A `DenoiserClass` for a network in training, whose modulation is not the files'.

    Attributes:
        denoiser: the generation's own; it takes `rows` as a keyword.
        rows: makes the modulation of noise levels.
    """

    denoiser: Any
    rows: Callable[[np.ndarray], Any]

    @property
    def costs(self) -> Mapping[str, Costs]:
        """As `DenoiserClass.costs`."""
        found: Mapping[str, Costs] = self.denoiser.costs
        return found

    @property
    def keeps_prefix(self) -> bool:
        """As `DenoiserClass.keeps_prefix`."""
        return bool(self.denoiser.keeps_prefix)

    def __call__(self, components: Components, conditions: Conditions, report: Reporter) -> Denoiser:
        """Makes the denoiser of an image."""
        made: Denoiser = self.denoiser(components, conditions, report, rows=self.rows)
        return made

    def check(self, components: Components, conditions: Conditions) -> None:
        """As `DenoiserClass.check`."""
        self.denoiser.check(components, conditions)

    def kept_values(self, config: Any, evaluations: int, prefix_tokens: int, branches: int) -> int:
        """As `DenoiserClass.kept_values`."""
        return int(self.denoiser.kept_values(config, evaluations, prefix_tokens, branches))

    def pass_flop(self, config: Any, target_tokens: int, prefix_tokens: int) -> float:
        """As `DenoiserClass.pass_flop`."""
        return float(self.denoiser.pass_flop(config, target_tokens, prefix_tokens))


class Encoded(NamedTuple):
    """What a `ConditionEncoder` makes.

    Attributes:
        states: (1, L, C) of each prompt's rows that count, evaluated.
        starts: the row where each image's places begin, the same for all prompts; () where the transformer does not
            read images in the midst of a prompt.
    """

    states: list[mx.array]
    starts: tuple[int, ...] = ()


class ConditionEncoder(Protocol):
    """Turns prompts and images into the states that a denoiser takes."""

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image],
        report: Reporter,
        sequential_positions: bool = False,
        reference_pixels: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Encoded:
        """The prompts' states.

        Args:
            prompts: of any length; all are checked.
            images: the images for the text encoder, upright; [] for none.
            report: receives the stages.
            sequential_positions: number the tokens 0, 1, 2, … even with images.
            reference_pixels: maximum pixels of each image that the transformer sees; None is the model's own area.
            only: numbers of the prompts whose states are computed; None is all. Without one nothing is loaded.

        Raises:
            RequestError: a prompt is too long, or holds what stands for an image.
            CheckpointError: the tokenizer belongs to a different model.
            QwenImageError: the states are not finite, which float16 can cause.
        """

    def caption(self, image: Image, area: int, language: CaptionLanguage, seed: int, report: Reporter) -> str:
        """The caption of an image, shown at about `area` pixels; raises CheckpointError if it cannot write."""
