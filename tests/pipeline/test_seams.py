"""The seams: what another generation would hand in is used, and asked what a plan or a preview needs to know."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx import GenerationParameters, QwenImagePipeline, RequestError
from qwen_image_mlx.pipeline.parameters import check_size
from qwen_image_mlx.pipeline.qwen_image.denoiser import QwenImageDenoiser
from qwen_image_mlx.pipeline.reporter import Reporter
from qwen_image_mlx.registry import CLASSES, TRANSFORMER
from qwen_image_mlx.runtime.memory_plan import Work, make_plan
from qwen_image_mlx.sampling.latents import LatentSpace
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=3, cfg_scale=2.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


class Drift:
    """A denoiser whose velocity is one number, and that notes what it is made from."""

    made: list = []  # noqa: RUF012
    costs = QwenImageDenoiser.costs

    def __init__(self, components, conditions, report):
        self.made.append(conditions)

    def velocities(self, latents, evaluation, on_layer=None, branches=None):
        return [mx.full(latents.shape, 0.25, latents.dtype) for _ in self.made[-1].branches]

    @staticmethod
    def check(components, conditions):
        if conditions.branches[0].shape[1] > 1000:
            raise RequestError("too long for it")

    @staticmethod
    def kept_values(config, evaluations, prefix_tokens, branches):
        return 1_000_000 * evaluations + 1000 * prefix_tokens * branches


def test_a_pipeline_works_with_the_denoiser_it_is_given(tiny):
    opened = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    pipeline = QwenImagePipeline(opened.components, Reporter(), Drift)
    encoding = pipeline.encode_guidance_prompts("a fox", " ")
    noise = mx.random.normal((1, 12, 64), key=mx.random.key(0))
    result = pipeline.denoise_latents(PARAMETERS, encoding, latents=noise)
    np.testing.assert_allclose(np.array(result), np.array(noise) - 0.25, atol=1e-6)  # from sigma 1 to 0
    (conditions,) = Drift.made
    assert (conditions.frames, conditions.rows, conditions.columns) == (1, 3, 4)
    assert (len(conditions.branches), len(conditions.sigmas), conditions.references) == (2, 3, ())
    assert not pipeline.is_transformer_loaded, "nothing else needs it"
    with pytest.raises(RequestError, match="too long for it"):
        pipeline.denoise_latents(PARAMETERS, replace(encoding, positive=mx.zeros((1, 1001, 64))))


def test_a_plan_counts_what_a_denoiser_keeps(tiny, monkeypatch):
    components = QwenImagePipeline.from_pretrained(tiny, dtype="float32").components
    name = VARIANTS["QwenImagePipeline"].classes[TRANSFORMER]
    before = make_plan(components, Work(64, 48, steps=2)).stages[2].resident
    monkeypatch.setitem(CLASSES, name, replace(CLASSES[name], use="pipeline.qwen_image.denoiser:Drift"))
    monkeypatch.setattr("qwen_image_mlx.pipeline.qwen_image.denoiser.Drift", Drift, raising=False)
    once, twice = (make_plan(components, Work(64, 48, steps=2, guided=g)).stages[2].resident for g in (False, True))
    assert twice - once == 4 * 1000 * 256
    table = 2 * components.config(TRANSFORMER).modulation_size
    assert once - before == 4 * (2_000_000 + 1000 * 256 - table)


def test_sides_are_multiples_of_what_the_model_wants(tiny, monkeypatch):
    monkeypatch.setitem(VARIANTS, "QwenImagePipeline", replace(VARIANTS["QwenImagePipeline"], size_multiple=32))
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    assert pipeline.latent_space.size_multiple == 32
    with pytest.raises(RequestError, match="height is 48, but must be a multiple of 32; 32 and 64 are near"):
        pipeline.generate("a fox", width=64, height=48, num_inference_steps=1, progress=False)
    assert not pipeline.is_loaded, "it is refused before any work"
    with pytest.raises(RequestError, match="multiple of 32"):
        pipeline.denoise_latents(PARAMETERS, None)
    with pytest.raises(RequestError, match="multiple of 16"):
        check_size(24, 48)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_space_packs_as_it_says(patch):
    space = LatentSpace(channels=5, factor=16 // patch, patch=patch, size_multiple=16, pixel_channels=4)
    frames = mx.random.normal((1, 3, 48 // space.factor, 64 // space.factor, 5), key=mx.random.key(0))
    tokens = space.pack_frames(frames)
    assert tokens.shape == space.shape(3, 64, 48) == (1, 3 * space.tokens(64, 48), space.token_channels)
    assert space.grid(64, 48) == (3, 4)
    assert mx.array_equal(space.unpack_frames(tokens, 3, 64, 48), frames)
    one = space.pack(frames[:, 1])
    assert mx.array_equal(one, tokens[:, 12:24])
    assert one[0, 5].reshape(5, patch, patch)[2, -1, 0] == frames[0, 1, 2 * patch - 1, patch, 2]
