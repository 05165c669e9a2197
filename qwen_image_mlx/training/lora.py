"""LoRAs in training: low-rank branches of frozen matrices, dense or packed, and the file they are saved in.

The file is diffusers', with PEFT's settings, which this package's loader and diffusers both read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..errors import RequestError
from ..models import nn
from ..registry import MAIN, TRANSFORMER, component_for
from ..weights.mapping import expected_tensors
from ..weights.safetensors_files import save_tensors
from .loss import key_of
from .settings import TARGETS

PREFIX = "transformer."  # of a network's parameters, and of a file's tensors


class LoRALinear(nn.Module):
    """layer(x) + scale * (x A^T) B^T, of which A (r, in) and B (out, r) are trained."""

    def __init__(self, layer: nn.Module, a: mx.array, b: mx.array, scale: float):
        super().__init__()
        self.layer: nn.Module = layer
        self.lora_A: mx.array = a
        self.lora_B: mx.array = b
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        """x (…, in) to (…, out), in x's dtype if A and B have it."""
        return self.layer(x) + self.scale * ((x @ self.lora_A.T) @ self.lora_B.T)

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """The output (…, out) as a tuple of terms, the form of the models' other layers."""
        return (self(x),)


def add_lora(
    transformer: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    targets: str,
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Freezes a transformer and attaches branches to some of its matrices; at first they change nothing.

    A is drawn with a standard deviation of 1 / rank and B is 0, as in diffusers' training script ("gaussian").

    Args:
        transformer: dense or packed.
        shapes: (out, in) of its matrices, by name, as `matrices` gives them.
        targets: "attention", "all", or ends of names, separated by commas.
        rank: of each branch.
        alpha: branches are scaled by alpha / rank; None is rank.
        seed: of A.

    Returns:
        The names of the matrices.

    Raises:
        RequestError: a target matches no matrix, or the rank is too high.
    """
    names = check_lora(shapes, targets, rank)
    layers = dict(transformer.named_modules())
    transformer.freeze()
    branches = []
    for name in names:
        out, width = shapes[name]
        a = mx.random.normal((rank, width), key=key_of(seed, "lora", name)) / rank
        branches.append((name, LoRALinear(layers[name], a, mx.zeros((out, rank)), (alpha or rank) / rank)))
    transformer.update_modules(tree_unflatten(branches))
    mx.eval(transformer.trainable_parameters())
    return names


def matrices(config: Any) -> dict[str, tuple[int, ...]]:
    """(out, in) of every matrix that stays in memory, by its module's name."""
    specs = expected_tensors(component_for(TRANSFORMER, config), config).values()
    return {
        spec.name.removesuffix(".weight"): spec.shape for spec in specs if spec.part == MAIN and len(spec.shape) == 2
    }


def check_lora(shapes: Mapping[str, tuple[int, ...]], targets: str, rank: int) -> list[str]:
    """The names of the matrices that a LoRA changes; raises RequestError if a target or the rank does not fit."""
    names = match_names(shapes, targets)
    smallest = min(names, key=lambda name: min(shapes[name]))
    if not 1 <= rank <= min(shapes[smallest]):
        raise RequestError(f"rank is {rank}, but must be from 1 to {min(shapes[smallest])}, the size of {smallest}")
    return names


def match_names(names: Collection[str], targets: str) -> list[str]:
    """The names that match "attention", "all" or comma-separated ends of names; raises RequestError for no match."""
    if targets in TARGETS:  # a model of one block lacks some of them
        return [name for name in names if name.endswith(tuple(f".{end}" for end in TARGETS[targets]))]
    ends = tuple(end.strip() for end in targets.split(","))
    fitting = {end: [name for name in names if name == end or (end and name.endswith(f".{end}"))] for end in ends}
    if odd := [end for end, found in fitting.items() if not found]:
        allowed = sorted({name.partition(".")[2].partition(".")[2] or name for name in names})
        raise RequestError(
            f"targets name {odd[0]!r}, but must be {', '.join(TARGETS)} or some of: {', '.join(allowed)}"
        )
    return [name for name in names if any(name in found for found in fitting.values())]


def save_lora(
    path: Path, parameters: Mapping[str, mx.array], rank: int, alpha: float, record: Mapping[str, object]
) -> None:
    """Writes a LoRA file for `pipe.load_lora_weights`, whole or not at all.

    Args:
        path: a .safetensors file.
        parameters: of a `Network`, by name.
        rank, alpha: of every branch.
        record: JSON of how it was trained, for reference.

    Raises:
        OutputError: it could not be written.
    """
    modules = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in parameters})
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "init_lora_weights": "gaussian", "use_dora": False, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{PREFIX}{key}": value for key, value in settings.items()}),
        "qwen_image_mlx.training": json.dumps(record, ensure_ascii=False),
    }
    save_tensors(path, {f"{name}.weight": array for name, array in parameters.items()}, metadata)
