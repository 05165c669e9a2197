"""The schedule against diffusers' FlowMatchEulerDiscreteScheduler, live and to the last bit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import REAL_CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.sampling.schedule import Schedule, exponential_mu, make_schedule, static_shift, uniform_sigmas

REAL = REAL_CONFIGS["scheduler"]
LIGHTNING = REAL | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
CONFIGS = {
    "real": REAL,
    "no terminal": REAL | {"shift_terminal": None},
    "layered": REAL_CONFIGS["scheduler-layered"],
    "linear with terminal": REAL | {"time_shift_type": "linear"},
    "static": REAL | {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
    "static with terminal": REAL | {"use_dynamic_shifting": False, "shift": 1.7},
    "lightning": LIGHTNING,
}
SIZES = [(16, 16), (512, 512), (1024, 1024), (1664, 928), (1328, 1328), (2048, 2048), (4096, 4096)]
TOKENS = [width // 16 * (height // 16) for width, height in SIZES]
STEPS = [2, 3, 4, 8, 20, 50, 1000]


def read(config: dict) -> SchedulerConfig:
    return SchedulerConfig.from_dict({key: value for key, value in config.items() if not key.startswith("_")})


def ours(config: dict, sigmas: list[float], tokens: int) -> Schedule:
    return make_schedule(read(config), sigmas, exponential_mu(read(config), tokens))


def theirs(config: dict, sigmas: list[float] | np.ndarray, tokens: int):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    lengths = (config["base_image_seq_len"], config["max_image_seq_len"])
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(tokens, *lengths, config["base_shift"], config["max_shift"])
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", STEPS)
def test_sigmas_are_the_reference_s_to_the_last_bit(name, steps):
    for tokens in TOKENS:
        expected = theirs(CONFIGS[name], np.linspace(1.0, 1 / steps, steps), tokens).sigmas.numpy()
        schedule = ours(CONFIGS[name], uniform_sigmas(steps), tokens)
        assert schedule.sigmas.dtype == np.float32
        np.testing.assert_array_equal(schedule.sigmas, expected)


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.3], [0.9, 0.5, 0.25, 0.01], [1.0, 0.978453, 0.95418, 0.414568], [0.7]])
def test_custom_sigmas(name, sigmas):
    expected = theirs(CONFIGS[name], sigmas, 4096).sigmas.numpy()
    np.testing.assert_array_equal(ours(CONFIGS[name], sigmas, 4096).sigmas, expected)


@pytest.mark.reference
def test_timesteps_and_steps_are_those_of_the_reference():
    scheduler = theirs(REAL, np.linspace(1.0, 1 / 9, 9), 4096)
    schedule = ours(REAL, uniform_sigmas(9), 4096)
    assert schedule.num_steps == len(scheduler.timesteps) == 9
    np.testing.assert_array_equal(schedule.timesteps * np.float32(1000), scheduler.timesteps.numpy())
    deltas = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).tolist()
    assert [schedule.dt(step) for step in range(9)] == deltas


@pytest.mark.reference
def test_mu_is_a_line_through_the_config_s_two_points():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    goldens = {(512, 512): 0.538710, (1024, 1024): 0.693548, (1664, 928): 0.791129, (1328, 1328): 0.834325,
               (2048, 2048): 1.312903}  # fmt: skip
    for (width, height), mu in goldens.items():
        assert exponential_mu(read(REAL), width // 16 * (height // 16)) == pytest.approx(mu, abs=1e-6)
    assert exponential_mu(SchedulerConfig(), 2176) == pytest.approx(calculate_shift(2176), abs=1e-12)


@pytest.mark.parametrize(("steps", "begins", "ends"), [
    (4, [1, 0.7667093, 0.4556137, 0.02, 0], []),
    (8, [1, 0.9160240, 0.8200458, 0.7092946, 0.5800748, 0.4273469, 0.2440539, 0.02, 0], []),
    (50, [1, 0.9897009, 0.9791915, 0.9684653, 0.9575157], [0.0954985, 0.0584758, 0.02, 0]),
])  # fmt: skip
def test_goldens_at_one_megapixel(steps, begins, ends):
    sigmas = ours(REAL, uniform_sigmas(steps), 4096).sigmas
    assert len(sigmas) == steps + 1
    np.testing.assert_allclose(sigmas[: len(begins)], begins, atol=1e-7)
    np.testing.assert_allclose(sigmas[len(sigmas) - len(ends) :], ends, atol=1e-7)


@pytest.mark.parametrize(("mu", "steps", "begins", "ends"), [
    (2.5, 4, [1, 0.882353, 0.714286, 0.454545, 0], []),
    (2.5, 50, [1, 0.991903, 0.983607, 0.975104], [0.094340, 0.048544, 0]),
    (4.0, 50, [1, 0.994924, 0.989691, 0.984293], [0.142857, 0.075472, 0]),
])  # fmt: skip
def test_goldens_of_the_linear_shift(mu, steps, begins, ends):
    sigmas = make_schedule(read(CONFIGS["layered"]), uniform_sigmas(steps), mu).sigmas
    np.testing.assert_allclose(sigmas[: len(begins)], begins, atol=1e-6)
    np.testing.assert_allclose(sigmas[len(sigmas) - len(ends) :], ends, atol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize(("steps", "golden"), [
    (4, [1, 0.9, 0.75, 0.5, 0]),
    (8, [1, 0.9545455, 0.9, 0.8333334, 0.75, 0.6428571, 0.5, 0.3, 0]),
])  # fmt: skip
def test_a_static_shift_of_three_is_lightning_s_scheduler(steps, golden):
    for tokens in TOKENS:
        shifted = make_schedule(static_shift(read(REAL), 3.0), uniform_sigmas(steps), mu=tokens).sigmas
        np.testing.assert_allclose(shifted, golden, atol=1e-7)
        np.testing.assert_allclose(shifted, theirs(LIGHTNING, uniform_sigmas(steps), tokens).sigmas, atol=2e-7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CONFIGS)
def test_one_step_goes_from_one_to_zero(name):
    """With a terminal sigma the reference divides 0 by 0."""
    assert ours(CONFIGS[name], uniform_sigmas(1), 4096).sigmas.tolist() == [1, 0]


@pytest.mark.reference
@settings(deadline=None, max_examples=200)
@given(steps=st.integers(1, 100), strength=st.one_of(st.floats(0.001, 1), st.integers(1, 100).map(lambda n: n / 100)))
def test_a_part_of_the_schedule_is_the_one_image_to_image_takes(steps, strength):
    from diffusers import QwenImageImg2ImgPipeline

    config = REAL | {"shift_terminal": None}
    scheduler = theirs(config, uniform_sigmas(steps), 1024)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, count = QwenImageImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    part = ours(config, uniform_sigmas(steps), 1024).last(strength)
    if count == 0:  # the reference refuses; one step is the nearest that can be generated
        assert part.num_steps == 1
    else:
        np.testing.assert_array_equal(part.timesteps * np.float32(1000), timesteps.numpy())
    np.testing.assert_array_equal(part.sigmas, scheduler.sigmas.numpy()[-max(count, 1) - 1 :])


@settings(deadline=None)
@given(steps=st.integers(1, 1000), tokens=st.integers(1, 65536), name=st.sampled_from(list(CONFIGS)))
def test_sigmas_fall_from_one_to_zero(steps, tokens, name):
    sigmas = ours(CONFIGS[name], uniform_sigmas(steps), tokens).sigmas
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert np.isfinite(sigmas).all()
    assert (np.diff(sigmas) < 0).all()


@settings(deadline=None)
@given(levels=st.sets(st.integers(1, 1000), min_size=1, max_size=30), name=st.sampled_from(list(CONFIGS)))
def test_custom_sigmas_fall_to_zero(levels, name):
    sigmas = ours(CONFIGS[name], [level / 1000 for level in sorted(levels, reverse=True)], 4096).sigmas
    assert np.isfinite(sigmas).all()
    assert (np.diff(sigmas) < 0).all()
    assert 0 < sigmas[0] <= 1
    assert (sigmas[0] == 1) == (1000 in levels)
    assert sigmas[-1] == 0
