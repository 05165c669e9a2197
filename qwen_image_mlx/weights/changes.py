"""What loading has to know of LoRAs, or of anything else that changes weights on their way in: two protocols.

`lora.adapters` fulfils them. So this room loads, streams and folds weights without knowing what a LoRA is.
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
        """A parameter with all changes, fp32, evaluated."""

    def placement(self) -> Placement:
        """What takes the changes into one module that is loaded."""


class Placement(Protocol):
    """Changes on their way into one module."""

    def changes(self, name: str) -> bool:
        """Whether a parameter, by its canonical name, is changed."""

    def matrix(
        self, name: str, value: mx.array | Packed, scheme: Scheme | None, dtype: mx.Dtype
    ) -> tuple[mx.array | Packed, Branch | None]:
        """A changed matrix as it is to be stored, dense in `dtype` or packed, and what runs unmerged; evaluated."""

    def vector(self, name: str, value: mx.array) -> mx.array:
        """A changed bias, or a norm's weight; fp32, evaluated."""

    def attach(self, module: nn.Module, path: str, branch: Branch) -> None:
        """Makes a branch run with the layer at a path of a module."""

    def say_what_became(self) -> None:
        """Logs what became of the changes, once the module is loaded."""
