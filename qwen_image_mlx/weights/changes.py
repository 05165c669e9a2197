"""Two protocols: what loading must know about LoRAs, or anything else that changes weights as they are loaded.

`lora.adapters` implements them. So this room loads, streams and folds weights without knowing what a LoRA is.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..models import nn
from .packed import Packed
from .schemes import Scheme

Branch = tuple[mx.array, mx.array]
"""A (r, in) and B (out, r) of a low-rank branch that runs unmerged: y += (x A^T) B^T."""


class WeightChanges(Protocol):
    """Changes of a model's parameters."""

    def changes(self, name: str) -> bool:
        """Whether a parameter, by its canonical name, is changed."""

    def apply(self, name: str, value: mx.array) -> mx.array:
        """A parameter with all changes applied: fp32, its shape unchanged, evaluated."""

    def placement(self) -> Placement:
        """What applies the changes to one module while it is loaded."""


class Placement(Protocol):
    """Applies changes to one module while it is loaded."""

    def changes(self, name: str) -> bool:
        """Whether a parameter, by its canonical name, is changed."""

    def matrix(
        self, name: str, value: mx.array | Packed, scheme: Scheme | None, dtype: mx.Dtype
    ) -> tuple[mx.array | Packed, Branch | None]:
        """The changed (out, in) matrix, dense in `dtype` or packed, and the branch to run unmerged; evaluated."""

    def vector(self, name: str, value: mx.array) -> mx.array:
        """A changed bias or norm weight, (n,); fp32, evaluated."""

    def attach(self, module: nn.Module, path: str, branch: Branch) -> None:
        """Makes a branch run with the layer at this path of the module."""

    def log_placement(self) -> None:
        """Logs how the changes were applied, once the module is loaded."""
