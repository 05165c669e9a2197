"""Qwen-Image-2.1 in training: loss and gradients against torch's on the reference's transformer, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints_21 import TINY_TRANSFORMER
from mlx.utils import tree_flatten
from nets import named, relative
from peft import LoraConfig
from reference_21 import make_transformer_21

from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig
from qwen_image_mlx.models.qwen_image_21.transformer import Transformer
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.lora import add_lora, matrices
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.qwen_image_21.seam import QwenImage21Training
from qwen_image_mlx.training.settings import TARGETS
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header

pytestmark = pytest.mark.reference

TOLERANCE = 1e-4
SEAM = QwenImage21Training()
# The target, then the references: (first place in the prompt, rows, columns of latents).
SEGMENTS = {"t2i": ((0, 4, 6),), "edit": ((0, 4, 2), (2, 4, 4), (9, 2, 4))}
LENGTH = 14


class Twins:
    """The same random weights in both implementations."""

    def __init__(self, folder, targets=None):
        self.theirs = make_transformer_21(TINY_TRANSFORMER)
        self.theirs.save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        self.config = TransformerConfig.from_dict(TINY_TRANSFORMER)
        tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
        row = component_of("QwenImage21Transformer2DModel")
        self.weights = ComponentWeights(row, self.config, tensors, ["main", "modulation"])
        if targets:
            self.theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[*TARGETS[targets]]))

    def network(self, *, full=False, checkpointing=False):
        transformer = load_module(Transformer(self.config), self.weights, "main", mx.float32)
        modulation = None
        if full:
            modulation = load_module(SEAM.modulation(self.config), self.weights, "modulation", mx.float32)
        return SEAM.network(transformer, self.config, modulation, checkpointing)

    def table(self, flow):
        return SEAM.table(None, self.weights, flow.sigmas, range(1000), mx.float32, None, "")

    def loss(self, task, trainer, batch):
        """Theirs, its gradients made, for the noise and the levels that a trainer draws in its first step."""
        levels, noise = trainer.draws(0, 0, batch)
        sigmas = torch.from_numpy(np.array(trainer.flow.sigmas[levels]))
        latents, noise, text = (torch.from_numpy(np.array(a)) for a in (batch.latents, noise, batch.text))
        noisy = (1 - sigmas)[:, None, None] * latents + sigmas[:, None, None] * noise
        (_, *grid), *shown = SEGMENTS[task]
        mask = torch.zeros(len(batch), LENGTH + noisy.shape[1] // 4, dtype=torch.bool)
        mask[:, LENGTH:] = True
        for start, h, w in shown:
            mask[:, start : start + h * w // 4] = True
        references = [torch.from_numpy(np.array(batch.references))] if shown else []
        self.theirs.zero_grad()
        velocity = self.theirs(
            hidden_states=torch.cat([*references, noisy], dim=1), encoder_hidden_states=text, timestep=sigmas,
            img_shapes=[[*((1, h, w) for _, h, w in shown), (1, *grid)]] * len(batch), img_mask=mask, return_dict=False,
        )[0][:, -noisy.shape[1] :]  # fmt: skip
        loss = torch.mean(((velocity - (noise - latents)) ** 2).reshape(len(batch), -1), 1).mean()
        loss.backward()
        return loss.item()


def batch_of(task, size=2):
    rng = np.random.default_rng(0)
    segments = SEGMENTS[task]
    counts = segments[0][1] * segments[0][2], sum(h * w for _, h, w in segments[1:])
    latents, references = (mx.array(rng.standard_normal((size, n, 64), np.float32)) for n in counts)
    text = mx.array(3 * rng.standard_normal((size, LENGTH, TINY_TRANSFORMER["context_in_dim"]), np.float32))
    return Batch(latents, text, segments, references if segments[1:] else None)


def trainer_of(network, batch, table=None):
    return Trainer(network, lambda step: [batch], Optimizer(Rate(1e-3)), FlowMatching(), LoopSettings(seed=3), table)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}

    def get(targets=None):
        if targets not in made:
            made[targets] = Twins(tmp_path_factory.mktemp("twins"), targets)
        return made[targets]

    return get


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("task", SEGMENTS)
def test_full_gradients_are_those_of_torch(twins, task, checkpointing):
    both, batch = twins(), batch_of(task)
    trainer = trainer_of(both.network(full=True, checkpointing=checkpointing), batch)
    loss, gradients = trainer.gradients(0)
    assert loss == pytest.approx(both.loss(task, trainer, batch), rel=TOLERANCE)
    theirs = {name: p.grad for name, p in both.theirs.named_parameters() if p.grad is not None and p.grad.any()}
    ours = {name: gradients[key] for key, name in named(trainer.network).items()}
    assert {name for name, gradient in ours.items() if float(mx.abs(gradient).max()) > 0} == theirs.keys()
    worst = {name: relative(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("task", SEGMENTS)
def test_lora_gradients_are_those_of_peft(twins, task, targets, checkpointing):
    both, batch = twins(targets), batch_of(task)
    network = both.network(checkpointing=checkpointing)
    names = add_lora(network.transformer, matrices(both.config), targets, rank=4, alpha=8)
    assert len(names) == TINY_TRANSFORMER["num_layers"] * (4 if targets == "attention" else 7)
    trainer = trainer_of(network, batch, both.table(FlowMatching()))
    trainer.parameters = {  # B is 0 at first, which would hide A's gradient
        name: mx.random.normal(array.shape, key=mx.random.key(n)) * 0.1
        for n, (name, array) in enumerate(trainer.parameters.items())
    }
    theirs = {
        f"transformer.{name}".replace(".default.weight", ""): parameter
        for name, parameter in both.theirs.named_parameters()
        if parameter.requires_grad
    }
    assert theirs.keys() == trainer.parameters.keys() == dict(tree_flatten(network.trainable_parameters())).keys()
    for name, array in trainer.parameters.items():
        theirs[name].data = torch.from_numpy(np.array(array))
    loss, gradients = trainer.gradients(0)
    assert loss == pytest.approx(both.loss(task, trainer, batch), rel=TOLERANCE)
    worst = {name: relative(gradients[name], theirs[name].grad) for name in gradients}
    assert max(worst.values()) < TOLERANCE, worst


def test_a_single_sample_has_the_gradients_it_has_in_a_batch(twins):
    """One sample's rows go through the fused norm, a batch's through its parts."""
    both, batch = twins("attention"), batch_of("edit", size=1)
    trainers = []
    for given in (batch, Batch.join([batch, batch])):
        network = both.network()
        add_lora(network.transformer, matrices(both.config), "attention", rank=4)
        trainers.append(trainer_of(network, given, both.table(FlowMatching())))
    one, two = trainers
    levels, noise = one.draws(0, 0, batch)
    two.draws = lambda *_: (mx.concatenate([levels, levels]), mx.concatenate([noise, noise]))
    (loss, gradients), (again, others) = one.gradients(0), two.gradients(0)
    assert loss == pytest.approx(again, rel=1e-5)
    for name, gradient in gradients.items():
        assert mx.allclose(gradient, others[name], rtol=1e-3, atol=1e-5 * float(mx.abs(gradient).max())), name
