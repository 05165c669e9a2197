"""The loop: a run that was stopped goes on to the very same numbers, and a step that cannot be taken is not."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from nets import Twins

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.training.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint
from qwen_image_mlx.training.loop import LoopSettings, NotFinite, Trainer
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.optimizers import Optimizer, Rate

pytestmark = pytest.mark.reference

RECORD = {"model": "twins", "rank": 4}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("twins"), "edit")


def is_matrix(name: str, array: mx.array) -> bool:
    return array.ndim == 2 and ".attn." in name


def make(twins, batches=None, ema=0.99, rate=1e-3, seed=1, steps=6, network=None):
    rates = (Rate(scale * rate, warmup=2, schedule="cosine", steps=steps) for scale in (1, 2))
    return Trainer(
        network or twins.network(full=True),
        batches or (lambda step: [twins.batch(seed=step), twins.batch(seed=100 + step, length=5)]),
        Optimizer(next(rates), muon=is_matrix, muon_rate=next(rates)),
        FlowMatching("logit_normal", shift=2.0, weighting="cosmap"),
        LoopSettings(seed=seed, ema=ema),
    )


def test_a_resumed_run_is_the_straight_one_bit_for_bit(twins, tmp_path):
    straight, first, second = make(twins), make(twins), make(twins)
    results = []
    straight.run(6, lambda result: results.append(result))
    first.run(6, lambda result: result.step < 3)
    assert first.step == 3
    save_checkpoint(tmp_path, first, RECORD)
    load_checkpoint(last_checkpoint(tmp_path), second, RECORD)
    again = []
    second.run(6, lambda result: again.append(result))
    assert again == results[3:]
    assert straight.state.keys() == second.state.keys()
    for name, array in straight.state.items():
        assert mx.array_equal(array, second.state[name]), name


def test_a_step_is_finished_before_its_loss_is_read(twins, monkeypatch):
    """A failed GPU leaves zeros, and zero gradients would be taken for a step."""
    trainer, order = make(twins), []
    wait, read = mx.synchronize, mx.array.item
    monkeypatch.setattr(mx, "synchronize", lambda: order.append("finished") or wait())
    monkeypatch.setattr(mx.array, "item", lambda array: order.append("read") or read(array))
    trainer.run(1)
    assert order == [*["finished", "read"] * 3, "finished", "read"], "both batches, the norm, the step"


def test_the_last_two_checkpoints_are_kept(twins, tmp_path):
    trainer = make(twins)
    for step in range(4):
        trainer.run(step)
        save_checkpoint(tmp_path, trainer, RECORD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002.safetensors", "step-000003.safetensors"]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_step_and_seed_draws_its_own_noise(twins, seed):
    batch = twins.batch()
    trainer = make(twins, lambda step: [batch, batch], seed=seed)
    draws = [trainer.draws(step, number, batch) for step in range(2) for number in range(2)]
    draws.append(make(twins, lambda step: [batch], seed=7).draws(0, 0, batch))
    for n, (_, noise) in enumerate(draws):
        assert [m for m, (_, other) in enumerate(draws) if mx.array_equal(noise, other)] == [n]


def test_samples_count_the_same_however_they_are_batched(twins):
    """Noise belongs to a batch, so the split is made of two batches whose loss can be told apart."""
    small, large = twins.batch(size=1, seed=1), twins.batch(size=3, seed=2)
    both = make(twins, lambda step: [small, large])
    loss, gradients = both.gradients(0)
    parts = []
    for number, batch in enumerate((small, large)):
        alone = make(twins, lambda step, batch=batch: [batch])
        alone.draws = lambda step, _, batch, number=number: both.draws(step, number, batch)
        parts.append(alone.gradients(0))
    assert loss == pytest.approx((parts[0][0] + 3 * parts[1][0]) / 4, rel=1e-5)
    for name, gradient in gradients.items():
        expected = (parts[0][1][name] + 3 * parts[1][1][name]) / 4
        assert mx.allclose(gradient, expected, rtol=1e-4, atol=1e-6), name


def test_joined_batches_are_their_samples():
    pieces = [Batch(mx.full((1, 2, 4), n), mx.full((1, 3, 5), n), ()) for n in range(3)]
    joined = Batch.join(pieces)
    assert (len(joined), joined.references) == (3, None)
    assert joined.text[:, 0, 0].tolist() == [0, 1, 2]


def test_a_loss_that_is_no_number_stops_before_it_does_harm(twins):
    poisoned = twins.batch(seed=2)
    poisoned = Batch(poisoned.latents * math.nan, poisoned.text, poisoned.segments, poisoned.references)
    trainer = make(twins, lambda step: [twins.batch(seed=step) if step < 2 else poisoned])
    trainer.run(2)
    before = dict(trainer.state)
    with pytest.raises(NotFinite, match=r"the loss is nan .* in step 3"):
        trainer.run(6)
    assert trainer.step == 2
    for name, array in trainer.state.items():
        assert mx.array_equal(array, before[name])
        assert mx.isfinite(array).all()


def test_the_average_follows_the_parameters_and_can_be_put_in_their_place(twins):
    trainer = make(twins)
    trainer.run(3)
    name = next(iter(trainer.parameters))

    def resident():
        return dict(tree_flatten(trainer.network.trainable_parameters()))[name]

    assert mx.array_equal(resident(), trainer.parameters[name])
    with trainer.weights():
        assert mx.array_equal(resident(), trainer.average[name])
    assert mx.array_equal(resident(), trainer.parameters[name])
    assert not mx.array_equal(trainer.average[name], trainer.parameters[name])


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(twins, tmp_path):
    path = save_checkpoint(tmp_path, make(twins), RECORD)
    with pytest.raises(CheckpointError, match="belongs to a run with rank 4 and not 8"):
        load_checkpoint(path, make(twins), {**RECORD, "rank": 8})
    with pytest.raises(CheckpointError, match="a different network"):
        load_checkpoint(path, make(twins, network=twins_without_modulation(twins)), RECORD)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, make(twins), RECORD)


def twins_without_modulation(twins):
    network = twins.network(full=True)
    network.modulation.freeze()
    return network
