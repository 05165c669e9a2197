"""Noise levels, weighting and shift against diffusers' training_utils and scheduler."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import REAL_CONFIGS

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.training.loss import FlowMatching, key_of, training_shift
from qwen_image_mlx.training.settings import TIMESTEPS, WEIGHTINGS


@pytest.mark.reference
@pytest.mark.parametrize("config", [
    {}, {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
], ids=["dynamic", "static"])  # fmt: skip
def test_noise_levels_are_the_scheduler_s_before_a_size_is_known(config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {**REAL_CONFIGS["scheduler"], **config}
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    shift = training_shift(SchedulerConfig.from_dict(config))
    np.testing.assert_allclose(np.array(FlowMatching(shift=shift).sigmas), theirs.sigmas.numpy(), rtol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("options", [
    {"timesteps": "uniform"}, {"timesteps": "logit_normal"},
    {"timesteps": "logit_normal", "logit_mean": 0.8, "logit_std": 0.4}, {"timesteps": "mode"},
    {"timesteps": "mode", "mode_scale": 0.5},
], ids=str)  # fmt: skip
def test_levels_are_drawn_with_the_reference_s_density(options):
    import torch
    from diffusers.training_utils import compute_density_for_timestep_sampling

    flow = FlowMatching(**options)
    ours = np.array(flow.levels_drawn(key_of(0, "density"), 40000))
    assert (ours.min() >= 0, ours.max() < 1000, ours.dtype) == (True, True, np.uint32)
    u = compute_density_for_timestep_sampling(
        flow.timesteps, 40000, flow.logit_mean, flow.logit_std, flow.mode_scale, generator=torch.manual_seed(0)
    )
    theirs = (u * 1000).long().clip(0, 999).numpy()
    quantiles = np.linspace(0.02, 0.98, 13)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=15)


@pytest.mark.reference
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_the_reference_s(weighting):
    import torch
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    rng = np.random.default_rng(0)
    latents, noise, velocity = (rng.standard_normal((3, 5, 8), np.float32) for _ in range(3))
    sigmas = np.float32([1.0, 0.5, 0.03])
    flow = FlowMatching(weighting=weighting)
    ours = flow.loss(*map(mx.array, (velocity, latents, noise, sigmas)))
    weights = compute_loss_weighting_for_sd3(weighting, torch.from_numpy(sigmas)[:, None, None])
    error = torch.from_numpy(velocity) - torch.from_numpy(noise - latents)
    theirs = torch.mean((weights * error**2).reshape(3, -1), 1)
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-5)
    noisy = flow.noisy(*map(mx.array, (latents, noise, sigmas)))
    expected = (1 - sigmas)[:, None, None] * latents + sigmas[:, None, None] * noise
    np.testing.assert_allclose(np.array(noisy), expected, rtol=1e-5, atol=1e-6)


def test_keys_are_their_words_alone():
    words = [(seed, name, step) for seed in (0, 1) for name in ("noise", "levels") for step in range(3)]
    keys = [tuple(key_of(*word).tolist()) for word in words]
    assert len({*keys}) == len(words)
    assert keys == [tuple(key_of(*word).tolist()) for word in words]


@pytest.mark.parametrize(("field", "value"), [
    ("timesteps", "sigmoid"), ("weighting", "min_snr"), ("shift", 0.0), ("shift", float("nan")), ("logit_std", -1.0),
])  # fmt: skip
def test_impossible_objectives_are_refused(field, value):
    with pytest.raises(RequestError, match=f"^{field} is"):
        FlowMatching(**{field: value})
    assert FlowMatching(timesteps=TIMESTEPS[1]).weighting == "none"
