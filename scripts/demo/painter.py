"""Trains the demo's transformers from nothing, and paints with them in batches to see how they come along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen_image_mlx.config import TransformerConfig
from qwen_image_mlx.models.modulation import TimeModulation
from qwen_image_mlx.models.transformer import Transformer
from qwen_image_mlx.sampling.denoise import Guidance, denoise
from qwen_image_mlx.sampling.schedule import Schedule
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.loss import FlowMatching, key_of
from qwen_image_mlx.training.network import Batch, Network
from qwen_image_mlx.training.optimizers import Optimizer, Rate

from .samples import Samples

WARM_UP = 200  # steps
EMA = 0.999
RATE, MUON_RATE = 1e-3, 2e-3
_BORN_ZERO = ("img_mod.", "txt_mod.", "norm_out.", "proj_out.")


def new_network(config: TransformerConfig, seed: int = 0) -> Network:
    """A transformer and its modulation with random weights; every gate, and so its velocity, is 0."""
    network = Network(Transformer(config), config, TimeModulation(config))
    for path, module in network.named_modules():
        if "weight" not in module or isinstance(module, nn.RMSNorm) or any(part in f"{path}." for part in _BORN_ZERO):
            continue
        shape = module.weight.shape
        module.weight = mx.random.normal(shape, key=key_of(seed, path)) / shape[-1] ** 0.5
    return network


def new_trainer(network: Network, batches: Callable[[int], Sequence[Batch]], steps: int, seed: int = 0) -> Trainer:
    """Muon for the blocks' matrices, AdamW for the rest."""
    optimizer = Optimizer(
        Rate(RATE, WARM_UP, "cosine", steps), weight_decay=0.0, betas=(0.9, 0.99),
        muon=lambda name, array: name.startswith("transformer.transformer_blocks.") and array.ndim == 2,
        muon_rate=Rate(MUON_RATE, WARM_UP, "cosine", steps),
    )  # fmt: skip
    return Trainer(network, batches, optimizer, FlowMatching("logit_normal"), LoopSettings(seed, ema=EMA))


def draw_batches(kinds: Sequence[Samples], size: int, seed: int) -> Callable[[int], Sequence[Batch]]:
    """A step's batches: one of every kind, `size` samples together."""
    return lambda step: [
        kind.batch(np.random.default_rng([seed, step, n]), size // len(kinds)) for n, kind in enumerate(kinds)
    ]


def paint(network: Network, batch: Batch, negative: mx.array, schedule: Schedule, scale: float, seed: int) -> mx.array:
    """Latents (B, N, C) of a batch's prompts and references, guided away from negative prompts (B, M, C)."""
    branches = [batch.text, negative]
    rotary = [network.rotary(Batch(batch.latents, text, batch.segments)) for text in branches]

    def velocity(latents: mx.array, step: int, branch: int) -> mx.array:
        sigmas = mx.full((len(batch),), float(schedule.timesteps[step]))
        return network(latents, branches[branch], sigmas, rotary[branch], batch.references)

    noise = mx.random.normal(batch.latents.shape, key=key_of(seed, "paint"))
    return denoise(velocity, noise, schedule, Guidance(scale, True) if scale != 1 else None)
