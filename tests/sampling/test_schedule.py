"""Sigmas against the live FlowMatchEulerDiscreteScheduler, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from reference import REAL_CONFIGS

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.sampling.schedule import exponential_mu, make_schedule, static_shift, uniform_sigmas

REAL = REAL_CONFIGS["scheduler"]
CONFIGS = {
    "real": {},
    "no terminal": {"shift_terminal": None},
    "linear": {"time_shift_type": "linear", "shift_terminal": None},
    "static": {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
    "static, terminal": {"use_dynamic_shifting": False, "shift": 2.0},
}


def reference_sigmas(config, sigmas, mu):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**REAL, **config})
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy()


def ours(config, sigmas, tokens=4096):
    read = SchedulerConfig.from_dict({**REAL, **config})
    return make_schedule(read, sigmas, exponential_mu(read, tokens)).sigmas


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", [2, 3, 8, 50])
@pytest.mark.parametrize("tokens", [16, 256, 4096, 6889, 16384])
def test_sigmas_are_the_reference_s_bits(config, steps, tokens):
    sigmas = np.linspace(1.0, 1 / steps, steps)
    mu = exponential_mu(SchedulerConfig.from_dict({**REAL, **config}), tokens)
    np.testing.assert_array_equal(ours(config, uniform_sigmas(steps), tokens), reference_sigmas(config, sigmas, mu))


def test_custom_sigmas_are_shifted_like_the_reference_s():
    sigmas = [1.0, 0.9, 0.3, 0.25]
    mu = exponential_mu(SchedulerConfig.from_dict(REAL), 4096)
    np.testing.assert_array_equal(ours({}, sigmas), reference_sigmas({}, sigmas, mu))


@pytest.mark.parametrize(("tokens", "mu"), [(1024, 0.538710), (4096, 0.693548), (6032, 0.791129), (16384, 1.312903)])
def test_mu_goldens(tokens, mu):
    assert exponential_mu(SchedulerConfig.from_dict(REAL), tokens) == pytest.approx(mu, abs=1e-6)


@pytest.mark.parametrize(("steps", "golden"), [
    (4, [1, 0.7667093, 0.4556137, 0.02, 0]),
    (8, [1, 0.9160240, 0.8200458, 0.7092946, 0.5800748, 0.4273469, 0.2440539, 0.02, 0]),
])  # fmt: skip
def test_sigma_goldens(steps, golden):
    np.testing.assert_allclose(ours({}, uniform_sigmas(steps)), golden, atol=1e-6)


@pytest.mark.parametrize(("steps", "golden"), [
    (4, [1, 0.9, 0.75, 0.5, 0]),
    (8, [1, 0.9545455, 0.9, 0.8333334, 0.75, 0.6428571, 0.5, 0.3, 0]),
])  # fmt: skip
def test_lightning_goldens(steps, golden):
    schedule = make_schedule(static_shift(SchedulerConfig.from_dict(REAL), 3.0), uniform_sigmas(steps), mu=0.0)
    np.testing.assert_allclose(schedule.sigmas, golden, atol=1e-6)


def test_one_step_goes_from_one_to_zero():
    np.testing.assert_array_equal(ours({}, uniform_sigmas(1)), [1, 0])


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
@pytest.mark.parametrize("strength", [0.01, 0.2, 0.3, 0.6, 0.999, 1.0])
def test_partial_schedules_are_those_of_image_to_image(steps, strength):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**REAL, "shift_terminal": None})
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.7)
    pipe = type("Pipe", (), {"scheduler": scheduler})()
    timesteps, left = QwenImageImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    config = SchedulerConfig.from_dict({**REAL, "shift_terminal": None})
    part = make_schedule(config, uniform_sigmas(steps), 0.7).last(strength)
    assert part.num_steps == left
    np.testing.assert_allclose(1000 * part.timesteps, timesteps.numpy(), rtol=1e-6)


@given(steps=st.integers(1, 200), tokens=st.integers(1, 65536), terminal=st.sampled_from([None, 0.02, 0.3]))
def test_sigmas_fall_to_zero(steps, tokens, terminal):
    sigmas = ours({"shift_terminal": terminal}, uniform_sigmas(steps), tokens)
    assert np.isfinite(sigmas).all()
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()
