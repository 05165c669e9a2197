"""Variants of guidance: diffusers' guiders, the steps that are guided, and what contradicts itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx import GenerationParameters, RequestError
from qwen_image_mlx.sampling.denoise import denoise
from qwen_image_mlx.sampling.guidance import Guidance, guide
from qwen_image_mlx.sampling.schedule import Schedule

SCHEDULE = Schedule(np.linspace(1, 0, 11, dtype=np.float32))


def pair(size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(size * rng.standard_normal((1, 24, 16)).astype(np.float32) for _ in range(2))


def run(guidance: Guidance | None) -> tuple[list[int], mx.array]:
    asked = []

    def velocities(latents, evaluation, branches):
        asked.append(branches)
        return [latents * (0.3 - 0.2 * n) + 0.1 * evaluation for n in range(branches)]

    return asked, denoise(velocities, mx.array(pair()[0]), SCHEDULE, guidance)


def test_only_steps_of_the_interval_take_a_second_pass():
    assert run(Guidance(4.0, True, (0.25, 0.8)))[0] == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]


def test_an_interval_over_everything_changes_no_bit():
    (asked, whole), (plain_asked, plain) = run(Guidance(4.0, True, (0.0, 1.0))), run(Guidance(4.0, True))
    assert asked == plain_asked == [2] * 10
    assert mx.array_equal(whole, plain)
    assert not mx.array_equal(run(Guidance(4.0, True, (0.0, 0.9)))[1], plain)


def test_cfg_zero_star_rests_in_the_first_step():
    asked, _ = run(Guidance(4.0, False, zero_star=True))
    assert asked == [2] * 9


@pytest.mark.reference
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_cfg_zero_star_is_diffusers_s(size):
    import torch
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    positive, negative = pair(size)
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=4.0)
    guider._step, guider._num_inference_steps = 3, 10
    theirs = guider.forward(torch.tensor(positive), torch.tensor(negative)).pred.numpy()
    ours = guide(mx.array(positive), mx.array(negative), Guidance(4.0, False, zero_star=True))
    np.testing.assert_allclose(np.array(ours), theirs, atol=2e-5 * size)


@pytest.mark.reference
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_apg_is_diffusers_s(size, eta):
    import torch
    from diffusers.guiders import AdaptiveProjectedGuidance

    positive, negative = pair(size)
    guider = AdaptiveProjectedGuidance(guidance_scale=4.0, eta=eta)
    guider._step, guider._num_inference_steps = 3, 10
    assert guider.adaptive_projected_guidance_rescale == 15.0
    theirs = guider.forward(torch.tensor(positive), torch.tensor(negative)).pred.numpy()
    ours = guide(mx.array(positive), mx.array(negative), Guidance(4.0, False, apg=eta))
    np.testing.assert_allclose(np.array(ours), theirs, atol=3e-5 * max(size, 1))


def test_renormalization_comes_last():
    positive, negative = map(mx.array, pair())
    for variant in ({"zero_star": True}, {"apg": 0.0}):
        out = guide(positive, negative, Guidance(6.0, True, **variant))
        lengths = [np.linalg.norm(np.array(x), axis=-1) for x in (out, positive)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize(("options", "said"), [
    ({"guidance_interval": "0.2:0.8", "cfg_scale": 1.0}, "a guidance interval would change nothing: guidance is off"),
    ({"apg": 0.0, "cfg_scale": 1.0}, "APG would change nothing"),
    ({"apg": 0.0, "cfg_zero_star": True}, "choose one"),
    ({"guidance_interval": "0.8:0.2"}, "the first one smaller"),
    ({"guidance_interval": "0:1.5"}, "two numbers from 0 to 1"),
    ({"guidance_interval": "half"}, "two numbers from 0 to 1"),
    ({"guidance_interval": "0.5:0.52", "num_inference_steps": 20}, "holds no step of 20"),
    ({"cfg_zero_star": True, "num_inference_steps": 1}, "there is only one"),
    ({"step_cache": "first-block", "num_inference_steps": 8}, "useless with 8 steps"),
    ({"step_cache": "magic"}, "one of teacache"),
    ({"step_cache": "teacache:-1"}, "a threshold from 0 to 100"),
    ({"step_cache": "teacache:nan"}, "a threshold from 0 to 100"),
    ({"solver": "rk4"}, "one of euler"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(RequestError, match=said):
        GenerationParameters(width=64, height=64, **options)


def test_off_is_no_cache_whatever_the_steps():
    assert GenerationParameters(width=64, height=64, num_inference_steps=4, step_cache="off").step_cache is None
