"""AdamW against torch's, step by step; Muon, clipping and learning rates by what they are."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.settings import SCHEDULES

SHAPES = {"matrix": (6, 4), "bias": (6,)}


def random(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def arrays(values):
    return {name: mx.array(value) for name, value in values.items()}


@pytest.mark.reference
@pytest.mark.parametrize(("schedule", "theirs"), [
    ("constant", lambda s: min(1, (s + 1) / 3)),
    ("linear", lambda s: min((s + 1) / 3, (10 - s) / 7)),
    ("cosine", lambda s: min((s + 1) / 3, 0.5 * (1 + np.cos(np.pi * max(0, s - 3) / 7)))),
])  # fmt: skip
def test_adamw_with_clipping_and_a_schedule_is_torch_s(schedule, theirs):
    import torch

    start = random(0)
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    reference = torch.optim.AdamW(tensors.values(), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(reference, theirs)
    ours = Optimizer(Rate(1e-2, 3, schedule, 10), weight_decay=0.1, betas=(0.8, 0.99), clip=1.0)
    parameters = arrays(start)
    ours.init(parameters)
    for step in range(8):
        gradients = random(step + 1)
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        assert ours.rate(step) == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        rates.step()
        clipped, found = ours.clip(arrays(gradients))
        assert found.item() == pytest.approx(norm.item(), rel=1e-5)
        parameters = ours.update(step, parameters, clipped)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(np.array(parameters[name]), tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_without_a_limit_gradients_are_left_alone():
    gradients = arrays(random(0))
    kept, norm = Optimizer(Rate(1.0), clip=None).clip(gradients)
    assert kept is gradients
    assert norm.item() > 1


def test_muon_takes_what_it_is_given_and_makes_its_steps_orthogonal():
    optimizer = Optimizer(
        Rate(1e-3), weight_decay=0.0, muon=lambda name, array: array.ndim == 2, muon_rate=Rate(0.1, warmup=2)
    )
    parameters = arrays(random(0))
    optimizer.init(parameters)
    gradients = arrays(random(1))
    changed = optimizer.update(0, parameters, gradients)
    change = np.array(changed["matrix"] - parameters["matrix"])
    singular = np.linalg.svd(change, compute_uv=False)
    assert singular.min() > 0.5 * singular.max(), "all directions are moved alike"
    assert singular.max() == pytest.approx(0.05 * (6 / 4) ** 0.5, rel=0.3), "half of its rate, by its shape"
    bias = np.array(changed["bias"] - parameters["bias"])
    np.testing.assert_allclose(bias, -1e-3 * np.sign(np.array(gradients["bias"])), rtol=1e-3)


def test_muon_s_weight_decay_is_decoupled():
    zero = {"matrix": mx.zeros((6, 4))}
    optimizer = Optimizer(Rate(1.0), weight_decay=0.5, muon=lambda name, array: True, muon_rate=Rate(0.1))
    optimizer.init(zero)
    changed = optimizer.update(0, {"matrix": mx.ones((6, 4))}, zero)
    np.testing.assert_allclose(np.array(changed["matrix"]), 0.95, rtol=1e-6)


def test_a_state_goes_on_where_it_was():
    def steps(optimizer, parameters, numbers):
        for step in numbers:
            parameters = optimizer.update(step, parameters, arrays(random(step + 1)))
        return parameters

    def make():
        return Optimizer(Rate(1e-2), muon=lambda name, array: name == "matrix", muon_rate=Rate(1e-2))

    straight, first, second = make(), make(), make()
    for optimizer in (straight, first):
        optimizer.init(arrays(random(0)))
    expected = steps(straight, arrays(random(0)), range(6))
    middle = steps(first, arrays(random(0)), range(3))
    second.restore(middle, {name: mx.array(np.array(value)) for name, value in first.state.items()})
    for name, array in steps(second, middle, range(3, 6)).items():
        assert mx.array_equal(array, expected[name])
    with pytest.raises(KeyError):
        make().restore(middle, {})


@pytest.mark.parametrize("harm", ["step", "v", "m", "absent", "dtype"])
def test_a_state_of_another_shape_is_refused(harm):
    parameters = {"a": mx.zeros((2, 3))}
    optimizer = Optimizer(Rate(1e-3))
    optimizer.init(parameters)
    optimizer.update(0, parameters, {"a": mx.ones((2, 3))})
    state = dict(optimizer.state)
    optimizer.restore(parameters, state)
    if harm == "absent":
        del state["adamw/a/v"]
    elif harm == "dtype":
        state["adamw/step"] = mx.array(1.5)
    else:
        state["adamw/step" if harm == "step" else f"adamw/a/{harm}"] = mx.zeros((3, 2))
    with pytest.raises(KeyError, match="adamw"):
        optimizer.restore(parameters, state)


def test_impossible_rates_are_refused():
    for rate in ({"peak": 0.0}, {"peak": float("nan")}, {"peak": 1.0, "schedule": "step"}):
        with pytest.raises(RequestError):
            Rate(**rate)
    assert {Rate(1.0, schedule=name, steps=2)(0) for name in SCHEDULES} == {1.0}
