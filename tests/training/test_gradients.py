"""Loss and gradients against torch's on the reference's transformer, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from nets import TASKS, Twins, named, relative

from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.optimizers import Optimizer, Rate

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}

    def get(task):
        if task not in made:
            made[task] = Twins(tmp_path_factory.mktemp("twins"), task)
        return made[task]

    return get


def reference_loss(twins, trainer, batch):
    """Their loss for the noise and the levels that a trainer draws in its first step."""
    levels, noise = trainer.draws(0, 0, batch)
    sigmas = torch.from_numpy(np.array(trainer.flow.sigmas[levels]))
    latents, noise = (torch.from_numpy(np.array(array)) for array in (batch.latents, noise))
    noisy = (1 - sigmas)[:, None, None] * latents + sigmas[:, None, None] * noise
    twins.theirs.zero_grad()
    velocity = twins.velocity(batch, noisy, sigmas)
    loss = torch.mean(((velocity - (noise - latents)) ** 2).reshape(len(batch), -1), 1).mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("task", TASKS)
def test_full_gradients_are_those_of_torch(twins, task, checkpointing):
    both = twins(task)
    batch = both.batch()
    network = both.network(full=True, checkpointing=checkpointing)
    trainer = Trainer(network, lambda step: [batch], Optimizer(Rate(1e-3)), FlowMatching(), LoopSettings(seed=3))
    loss, gradients = trainer.gradients(0)
    assert loss == pytest.approx(reference_loss(both, trainer, batch), rel=TOLERANCE)
    theirs = {name: p.grad for name, p in both.theirs.named_parameters() if p.grad is not None and p.grad.any()}
    ours = {name: gradients[key] for key, name in named(network).items()}
    norms = {name: float(mx.abs(gradient).max()) for name, gradient in ours.items()}
    assert {name for name, norm in norms.items() if norm > 0} == theirs.keys()
    worst = {name: relative(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) < TOLERANCE, worst
