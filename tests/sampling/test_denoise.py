"""The loop: guidance and Euler steps in the reference's dtypes, how often the model is called, who is told."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from qwen_image_mlx.sampling.denoise import Guidance, denoise, euler_step, guide
from qwen_image_mlx.sampling.schedule import Schedule

SCHEDULE = Schedule(np.array([1, 0.7, 0.2, 0], np.float32))


def pair(dtype, seed):
    values = np.random.default_rng(seed).standard_normal((1, 9, 64)).astype(np.float32)
    name = str(dtype).rpartition(".")[2]
    return mx.array(values).astype(dtype), torch.from_numpy(values).to(getattr(torch, name))


def same(ours, theirs, tolerance):
    np.testing.assert_allclose(np.array(ours.astype(mx.float32)), theirs.float().numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.bfloat16, 0)])
def test_euler_step(dtype, tolerance):
    """In bf16 the same bits: dt is rounded, the product too, the sum is made in fp32 and rounded."""
    (x, theirs_x), (v, theirs_v) = pair(dtype, 0), pair(dtype, 1)
    dt = torch.tensor(0.7) - torch.tensor(1.0)
    expected = (theirs_x.to(torch.float32) + dt * theirs_v).to(theirs_v.dtype)
    ours = euler_step(x, v, SCHEDULE.dt(0))
    assert ours.dtype == dtype
    same(ours, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 0.0625)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_guidance(dtype, tolerance, renormalize):
    (pos, theirs_pos), (neg, theirs_neg) = pair(dtype, 0), pair(dtype, 1)
    expected = theirs_neg + 4.0 * (theirs_pos - theirs_neg)
    if renormalize:
        norms = [torch.norm(v, dim=-1, keepdim=True) for v in (theirs_pos, expected)]
        expected = expected * (norms[0] / norms[1])
    ours = guide(pos, neg, Guidance(4.0, renormalize))
    assert ours.dtype == dtype
    same(ours, expected, tolerance)


@pytest.mark.parametrize(("guidance", "branches"), [(None, [0]), (Guidance(3.0, True), [0, 1])])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_calls_of_the_model_and_the_callback(guidance, branches, dtype):
    calls, told = [], []

    def velocity(x, step, branch):
        assert x.dtype == dtype
        calls.append((step, branch))
        return x * 0.5 + branch

    result = denoise(velocity, mx.ones((1, 2, 64), dtype), SCHEDULE, guidance, lambda n, x: told.append((n, x.dtype)))
    assert calls == [(step, branch) for step in range(3) for branch in branches]
    assert told == [(1, dtype), (2, dtype), (3, dtype)]
    assert result.dtype == dtype


def test_blending_replaces_the_latents_after_each_step():
    seen = []

    def blend(done, x):
        seen.append(done)
        return mx.full(x.shape, float(done))

    inputs = []
    result = denoise(
        lambda x, step, branch: inputs.append(x[0, 0, 0].item()) or x, mx.zeros((1, 2, 64)), SCHEDULE, None, None, blend
    )
    assert seen == [1, 2, 3]
    assert inputs == [0, 1, 2]
    assert mx.array_equal(result, mx.full((1, 2, 64), 3.0))


def test_an_error_in_the_callback_ends_the_loop():
    def fail(done, x):
        raise KeyError(done)

    with pytest.raises(KeyError, match="1"):
        denoise(lambda x, step, branch: x, mx.zeros((1, 2, 64)), SCHEDULE, None, fail)
