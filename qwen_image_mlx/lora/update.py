"""The change a LoRA makes to one weight, computed from the tensors of its file.

Values are read when a change is computed, and dropped with it. W is always (out, in), as in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..gpu import all_finite, gpu_faults
from ..weights.safetensors_files import LazyTensors, Tensor
from .dialects import Rows
from .kinds import KINDS, Shape

Read = Callable[[str], mx.array]


class Arrays:
    """The arrays of one file: each is handed out once per opening, so that dropping it frees its memory."""

    def __init__(self, path: Path):
        self._path = path
        self._file: LazyTensors | None = None

    def take(self, tensor: Tensor) -> mx.array:
        """One tensor's values in float32 and its header's shape; raises CheckpointError unless all are finite."""
        try:
            self._file = self._file or LazyTensors(self._path)
            array = self._file.take(tensor)
            with gpu_faults():
                mx.eval(array)  # by itself, so that no operation waits for the disk
                if tensor.dtype == "F8_E4M3":
                    array = mx.from_fp8(array, mx.float32)
                finite = all_finite(array)
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointError) as error:
            raise CheckpointError(
                f"{self._path} could not be read to its end: it was changed or removed meanwhile, so start again"
            ) from error
        if not finite:
            raise CheckpointError(
                f"{self._path} holds NaN or infinity in {tensor.name}: it was damaged or its training failed; "
                "use another version of it"
            )
        array = array.astype(mx.float32)
        if isinstance(tensor, Rows):
            array = array[tensor.first : tensor.first + tensor.shape[0]]
        return array.reshape(tensor.shape)  # a 1x1 convolution as the matrix it is


@dataclass(frozen=True, eq=False)
class Update:
    """A LoRA's change of one target: W' = W + change, or with a magnitude m (DoRA) W' = m (W + change) / |W + change|.

    The change is strength * scale * product + strength * difference, where the product is, by kind,

    - LoRA: up @ down;
    - LoHa: (w1_a @ w1_b) * (w2_a @ w2_b);
    - LoKr: kron(w1, w2), where either may be a product of two;

    and, where the file replaces the weight, strength * (replacement - W). DoRA's strength acts where PEFT's and
    diffusers' does, inside the norm: at strength 0 the rows still get the trained magnitudes. The norm is taken over
    the input axis for m of shape (out,) or (out, 1), over the output axis for (1, in).

    Sources: PEFT's Linear, DoraLinearVariant, LoHaLayer and LoKrLayer; LyCORIS' modules; ComfyUI's weight adapters.

    Attributes:
        target: the module's canonical name.
        shape: its weight's shape: (out, in), or (dim,) of a norm.
        kind: "LoRA", "LoHa" or "LoKr"; None where it has no factors.
        tensors: the file's tensors for it, by role.
        scale: alpha / rank, without strength.
        strength: how much of it is applied.
    """

    target: str
    shape: Shape
    kind: str | None
    tensors: Mapping[str, Tensor]
    scale: float
    strength: float
    _arrays: Arrays = field(repr=False)

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the module's weight."""
        return self.kind is not None or not {"difference", "replacement"}.isdisjoint(self.tensors)

    @property
    def is_dora(self) -> bool:
        """Whether the result is scaled to stored magnitudes."""
        return "magnitude" in self.tensors

    @property
    def rank(self) -> int | None:
        """The number alpha is divided by; None without factors, and for a LoKr of unfactored matrices."""
        shapes = {role: tensor.shape for role, tensor in self.tensors.items()}
        return KINDS[self.kind].rank(shapes) if self.kind else None

    def delta(self, weight: mx.array) -> mx.array:
        """W' - W.

        Args:
            weight: float32, `shape`: the weight of the base model.

        Returns:
            float32, `shape`; lazy, but the file's tensors have been read and found finite.

        Raises:
            CheckpointError: the file holds NaN or infinity, or ends too early.
        """
        assert weight.shape == self.shape, (self.target, weight.shape)
        assert weight.dtype == mx.float32, (self.target, weight.dtype)
        change = mx.zeros(self.shape, mx.float32)
        if self.kind:
            change = change + self.strength * self.scale * _PRODUCTS[self.kind](self._read, self.tensors)
        if "difference" in self.tensors:
            change = change + self.strength * self._read("difference")
        if "replacement" in self.tensors:
            change = change + self.strength * (self._read("replacement") - weight)
        if not self.is_dora:
            return change
        moved = weight + change
        magnitude = self._read("magnitude")
        by_column = magnitude.shape == (1, self.shape[1]) != (self.shape[0], 1)
        norm = mx.linalg.norm(moved, axis=0 if by_column else 1, keepdims=True)
        magnitude = magnitude.reshape(norm.shape)
        return moved * mx.where(norm > 0, magnitude / norm, 0) - weight

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the module's bias."""
        return not {"up_bias", "bias_difference"}.isdisjoint(self.tensors)

    def bias_delta(self) -> mx.array | None:
        """The change of the module's bias: float32 (out,), strength included; None if unchanged.

        Raises:
            CheckpointError: the file holds NaN or infinity, or ends too early.
        """
        change = None
        if "up_bias" in self.tensors:
            change = self.strength * self.scale * self._read("up_bias")
        if "bias_difference" in self.tensors:
            difference = self.strength * self._read("bias_difference")
            change = difference if change is None else change + difference
        return change

    @property
    def has_factors(self) -> bool:
        """Whether `factors` returns a branch; reads nothing."""
        if self.kind is None or self.is_dora or not {"difference", "replacement"}.isdisjoint(self.tensors):
            return False
        out, width = self.shape
        rank = _BRANCH_RANKS[self.kind]({role: tensor.shape for role, tensor in self.tensors.items()})
        return rank * (out + width) <= out * width

    def factors(self) -> tuple[mx.array, mx.array] | None:
        """The change as a side branch: float32 A (r, in), B (out, r), so that y += (x A^T) B^T; strength is in B.

        It is exact: LoHa of rank r becomes a branch of rank r^2, LoKr one of the rank its Kronecker product has.

        Returns:
            A and B, or None where no branch can: DoRA, full differences, and factors larger than the weight.

        Raises:
            CheckpointError: the file holds NaN or infinity, or ends too early.
        """
        if not self.has_factors:
            return None
        a, b = _BRANCHES[self.kind](self._read, self.tensors)
        return a, self.strength * self.scale * b

    def check(self) -> None:
        """Reads every tensor once, and drops it.

        Raises:
            CheckpointError: the file holds NaN or infinity, or ends too early.
        """
        for role in self.tensors:
            self._read(role)

    def _read(self, role: str) -> mx.array:
        return self._arrays.take(self.tensors[role])


def _side(read: Read, roles: Iterable[str], side: str) -> mx.array:
    return read(side) if side in roles else read(f"{side}_a") @ read(f"{side}_b")


_PRODUCTS: dict[str, Callable[[Read, Iterable[str]], mx.array]] = {
    "LoRA": lambda read, roles: read("up") @ read("down"),
    "LoHa": lambda read, roles: (read("hada_w1_a") @ read("hada_w1_b")) * (read("hada_w2_a") @ read("hada_w2_b")),
    "LoKr": lambda read, roles: mx.kron(_side(read, roles, "lokr_w1"), _side(read, roles, "lokr_w2")),
}


def _loha_branch(read: Read, roles: Iterable[str]) -> tuple[mx.array, mx.array]:
    """(P Q) * (R S) = (P o R) (Q o S): products of every column of P with every column of R, rows likewise."""
    p, q, r, s = (read(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    b = (p[:, :, None] * r[:, None, :]).reshape(p.shape[0], -1)
    a = (q[:, None, :] * s[None, :, :]).reshape(-1, q.shape[1])
    return a, b


def _lokr_branch(read: Read, roles: Iterable[str]) -> tuple[mx.array, mx.array]:
    """kron(P Q, R S) = kron(P, R) kron(Q, S); a side that is not factored is itself times the identity."""
    pairs = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in roles:
            whole = read(side)
            pairs.append((whole, mx.eye(whole.shape[1])))
        else:
            pairs.append((read(f"{side}_a"), read(f"{side}_b")))
    (p, q), (r, s) = pairs
    return mx.kron(q, s), mx.kron(p, r)


def _lokr_branch_rank(shapes: Mapping[str, Shape]) -> int:
    ranks = (shapes[s][1] if s in shapes else shapes[f"{s}_b"][0] for s in ("lokr_w1", "lokr_w2"))
    return math.prod(ranks)


_BRANCHES: dict[str, Callable[[Read, Iterable[str]], tuple[mx.array, mx.array]]] = {
    "LoRA": lambda read, roles: (read("down"), read("up")),
    "LoHa": _loha_branch,
    "LoKr": _lokr_branch,
}
_BRANCH_RANKS: dict[str, Callable[[Mapping[str, Shape]], int]] = {
    "LoRA": lambda shapes: shapes["down"][0],
    "LoHa": lambda shapes: shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0],
    "LoKr": _lokr_branch_rank,
}
