"""Trains the demo's transformers from nothing, and generates with them in batches to see how they come along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image.transformer import Transformer
from qwen_image_mlx.sampling.guidance import Guidance, guide
from qwen_image_mlx.sampling.schedule import make_schedule, uniform_sigmas
from qwen_image_mlx.sampling.solvers import euler_step
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.loss import FlowMatching, key_of
from qwen_image_mlx.training.network import Batch, Network
from qwen_image_mlx.training.optimizers import Optimizer, Rate

from .checkpoint import SCHEDULER
from .samples import Samples

WARM_UP = 200  # steps
EMA = 0.999
RATE, MUON_RATE = 2e-3, 1.5e-2
_AVERAGE = "average/"  # what a checkpoint's names of averaged weights begin with
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


def put_average(network: Network, checkpoint: Path) -> None:
    """Puts the averaged weights of a checkpoint of `training.checkpoints` into a network."""
    state = mx.load(str(checkpoint))
    network.load_weights([(name.removeprefix(_AVERAGE), a) for name, a in state.items() if name.startswith(_AVERAGE)])


def file_weights(trainer: Trainer) -> dict[str, mx.array]:
    """The averaged weights by their names in a checkpoint, where transformer and modulation are one."""
    return {name.partition(".")[2]: value for name, value in trainer.average.items()}


def draw_batches(
    kinds: Sequence[Samples], sizes: Sequence[int], seed: int, drop: float
) -> Callable[[int], Sequence[Batch]]:
    """A step's batches: one of every kind, with a number of samples each; the share `drop` has no prompt."""
    return lambda step: [
        kind.batch(np.random.default_rng([seed, step, n]), size, drop)
        for n, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]


def generate(network: Network, samples: Samples, steps: int, scale: float, seed: int = 0) -> mx.array:
    """Latents (N, F * 16, 64) regenerated of all samples' prompts and references.

    Args:
        network: with the weights to generate with.
        samples: their latents are not looked at.
        steps: of the sampler.
        scale: of guidance; 1 generates without.
        seed: of the noise.
    """
    schedule = make_schedule(SCHEDULER, uniform_sigmas(steps), 0)
    found: list[mx.array] = [mx.array(0)] * len(samples.latents)
    for members in samples.alike.values():
        batch = samples.at(members, samples.prompt[members])
        branches = [batch, samples.at(members, samples.dropped[members, -1])][: 1 if scale == 1 else 2]
        latents = mx.random.normal(batch.latents.shape, key=key_of(seed, "generate", int(members[0])))
        for step, sigma in enumerate(schedule.timesteps):
            sigmas = mx.full((len(batch),), float(sigma))
            ways = [network(latents, b.text, sigmas, network.rotary(b), b.references) for b in branches]
            velocity = ways[0] if scale == 1 else guide(*ways, Guidance(scale, renormalize=not samples.layered))
            latents = euler_step(latents, velocity, schedule.dt(step))
            mx.eval(latents)
        for n, generated in zip(members, latents, strict=True):
            found[n] = generated
    return mx.stack(found)
