"""A batch of samples, and what the networks of all generations share in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..models import nn
from .seam import Segments


@dataclass(frozen=True)
class Batch:
    """Samples of one shape: the same segments, and prompts of the same number of tokens, so that nothing is padded.

    Attributes:
        latents: clean packed latents of the target, all its frames (B, N, C), fp32.
        text: encoder states (B, L, J).
        segments: the target's frames, then the references; what the generation's seam made of them.
        references: packed latents (B, R, C), fp32, or None.
    """

    latents: mx.array
    text: mx.array
    segments: Segments
    references: mx.array | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """One batch of several of the same shape."""
        first = batches[0]
        join = {"latents": mx.concatenate([b.latents for b in batches]),
                "text": mx.concatenate([b.text for b in batches])}  # fmt: skip
        if first.references is not None:
            join["references"] = mx.concatenate([b.references for b in batches])
        return replace(first, **join)


class TrainingNetwork(nn.Module, ABC):
    """A transformer and, if it is trained too, its modulation.

    A generation says how it is called: with noisy latents, states, sigmas, what `rotary` makes of the batch, references
    and the modulation of `Trainable.table`, None if it is trained.

    Args:
        transformer: dense or quantized; its frozen parameters stay as they are.
        config: its config.
        modulation: the trained one; None takes each batch's rows from a table.
        checkpointing: keep only the inputs of each block, and recompute the rest for the gradient.
    """

    def __init__(
        self, transformer: nn.Module, config: Any, modulation: nn.Module | None = None, *, checkpointing: bool = False
    ):
        super().__init__()
        self.transformer = transformer
        if modulation is not None:
            self.modulation = modulation
        self._checkpointing = checkpointing
        self._rotary = cache(lambda segments, length: self.lay_out(segments, length, config.axes_dims_rope))

    @staticmethod
    @abstractmethod
    def lay_out(segments: Segments, length: int, axes_dims: Sequence[int]) -> Any:
        """The tokens' rotary tables, for samples with these segments and `length` states."""

    def rotary(self, batch: Batch) -> Any:
        """The rotary tables of a batch's tokens, made once for each shape."""
        return self._rotary(batch.segments, batch.text.shape[1])
