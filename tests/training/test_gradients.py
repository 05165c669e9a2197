"""Loss and gradients against torch's on the reference's transformer, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from nets import TASKS, Twins, named, relative
from peft import LoraConfig

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.models.layers import gelu_tanh
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.lora import add_lora, check_lora, matrices
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.settings import ATTENTION, TARGETS
from qwen_image_mlx.training.table import LevelTable

pytestmark = pytest.mark.reference

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


def lora_trainer(both, folder, batch, targets="attention", checkpointing=False, alpha=8, flow=None):
    """A trainer of LoRAs, and the reference's transformer with PEFT's of the same random values."""
    network = both.network(full=False, checkpointing=checkpointing)
    add_lora(network.transformer, matrices(both.config), targets, rank=4, alpha=alpha)
    flow = flow or FlowMatching()
    table = LevelTable(
        folder, both.weights, flow.sigmas, range(1000), mx.float32, both.config.zero_cond_t, None, both.task
    )
    trainer = Trainer(network, lambda step: [batch], Optimizer(Rate(1e-3)), flow, LoopSettings(seed=3), table)
    trainer.parameters = {  # B is 0 at first, which would hide A's gradient
        name: mx.random.normal(array.shape, key=mx.random.key(n)) * 0.2
        for n, (name, array) in enumerate(trainer.parameters.items())
    }
    return trainer


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The reference's transformer with PEFT's LoRAs, by task and targets."""
    made = {}

    def get(task, targets):
        if (task, targets) not in made:
            both = Twins(tmp_path_factory.mktemp("twins"), task)
            modules = [*TARGETS[targets]]
            both.theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=modules))
            made[task, targets] = both
        return made[task, targets]

    return get


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("task", TASKS)
def test_lora_gradients_are_those_of_peft(adapted, tmp_path, task, targets, checkpointing):
    both = adapted(task, targets)
    batch = both.batch()
    trainer = lora_trainer(both, tmp_path, batch, targets, checkpointing)
    theirs = {
        f"transformer.{name}".replace(".default.weight", ""): parameter
        for name, parameter in both.theirs.named_parameters()
        if parameter.requires_grad
    }
    # The last block's text is read by nobody, so nothing of it is trained here.
    dead = theirs.keys() - trainer.parameters.keys()
    assert {name.split(".", 3)[3] for name in dead} <= {
        f"{module}.lora_{side}" for module in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj",
                                               "txt_mlp.net.2") for side in "AB"
    }  # fmt: skip
    for name, array in trainer.parameters.items():
        theirs[name].data = torch.from_numpy(np.array(array))
    loss, gradients = trainer.gradients(0)
    assert loss == pytest.approx(reference_loss(both, trainer, batch), rel=TOLERANCE)
    worst = {name: relative(gradients[name], theirs[name].grad) for name in gradients}
    assert max(worst.values()) < TOLERANCE, worst
    ends = tuple(f".{end}" for end in TARGETS[targets])
    assert len(worst) == 2 * sum(name.endswith(ends) for name in matrices(both.config)) > 8


def test_a_single_sample_has_the_gradients_it_has_in_a_batch(adapted, tmp_path):
    """One sample's rows go through the fused norm, a batch's through its parts."""
    both = adapted("edit", "attention")
    batch = both.batch(size=1)
    trainer = lora_trainer(both, tmp_path, batch)
    twice = lora_trainer(both, tmp_path, type(batch).join([batch, batch]))
    levels, noise = trainer.draws(0, 0, batch)
    twice.draws = lambda *_: (mx.concatenate([levels, levels]), mx.concatenate([noise, noise]))
    twice.parameters = trainer.parameters
    (loss, gradients), (again, others) = trainer.gradients(0), twice.gradients(0)
    assert loss == pytest.approx(again, rel=1e-5)
    for name, gradient in gradients.items():
        assert mx.allclose(gradient, others[name], rtol=1e-3, atol=1e-5 * float(mx.abs(gradient).max())), name


def test_a_lora_begins_by_changing_nothing_and_trains_nothing_else(adapted, tmp_path):
    both = adapted("t2i", "attention")
    network = both.network(full=False)
    names = add_lora(network.transformer, matrices(both.config), "attention", rank=4)
    assert len(names) == 2 * len(ATTENTION) - 2
    trained = [name for name, _ in tree_flatten(network.trainable_parameters())]
    assert sorted(trained) == sorted(f"transformer.{name}.lora_{side}" for name in names for side in "AB")
    plain, batch = both.network(full=False), both.batch(size=1)
    rows = LevelTable(tmp_path, both.weights, FlowMatching().sigmas, [500], mx.float32, False, None, "")([500])
    arguments = (batch.latents, batch.text, None, network.rotary(batch), None, rows)
    assert mx.array_equal(network(*arguments), plain(*arguments))


def test_gradients_of_very_negative_activations_are_numbers():
    """Real models have them; exp(88) is the last that fp32 holds."""
    x = mx.array([-1e4, -200.0, -12.0, -9.0, 0.0, 12.0])
    gradient = mx.grad(lambda x: gelu_tanh(x).sum())(x)
    assert gradient.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 1], abs=1e-6)


def test_a_model_of_one_block_has_what_there_is_of_the_named_targets():
    only = matrices(TransformerConfig(num_layers=1))
    assert len(check_lora(only, "attention", 4)) == len(ATTENTION) - 2
    with pytest.raises(RequestError, match=r"targets name 'add_q_proj', but must be attention, all or some of: .*to_v"):
        check_lora(only, "to_q,add_q_proj", 4)
