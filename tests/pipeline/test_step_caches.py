"""Step caches with whole models: no bit at threshold 0, what they save, and that nothing stays for the next image."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_edit
from checkpoints_21 import write_checkpoint_21

from qwen_image_mlx import Cancelled, GenerationParameters, QwenImagePipeline, RequestError
from qwen_image_mlx.pipeline import calibrated
from qwen_image_mlx.pipeline.conductor import keeping
from qwen_image_mlx.pipeline.step_cache import CachedDenoiser
from qwen_image_mlx.runtime.memory_plan import Work, make_plan
from qwen_image_mlx.sampling.choices import CACHE_NAMES
from qwen_image_mlx.sampling.step_caches import METHODS, RELEASED, CacheFacts, TeaFacts
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

pytestmark = pytest.mark.slow

STEPS = 10
ENCODINGS = {}
ALWAYS = {"teacache": 100, "first-block": 100, "easycache": 100, "magcache": 100, "taylorseer": 3}
FACTS = CacheFacts(TeaFacts((1.0, 0.0), 0.0, 50.0, 0.2), tuple([1.0] * 50))


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path):
    """Every model has facts, and no calibration of this machine counts."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("qwen_image_mlx.pipeline.step_cache.facts_of", lambda components: FACTS)


@pytest.fixture(scope="module", params=["1.x", "2.1"])
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    made = write_checkpoint(folder, TINY) if request.param == "1.x" else write_checkpoint_21(folder)
    opened = QwenImagePipeline.from_pretrained(made, dtype="float32")
    ENCODINGS[opened] = opened.encode_guidance_prompts("a fox", "blurry")
    return opened


def made(pipeline, cache=None, seed=1, cfg_scale=4.0, progress=None, **options):
    encoding = ENCODINGS[pipeline]
    parameters = GenerationParameters(
        width=64, height=64, num_inference_steps=STEPS, cfg_scale=cfg_scale, step_cache=cache, **options
    )
    return pipeline.denoise_latents(parameters, encoding, seed=seed, progress=progress)


@pytest.mark.parametrize("method", METHODS)
def test_threshold_0_changes_no_bit(pipeline, method):
    assert mx.array_equal(made(pipeline, f"{method}:0"), made(pipeline))
    assert pipeline.components.passes == (2 * STEPS, 0)


@pytest.mark.parametrize("method", METHODS)
def test_passes_are_left_out_and_counted(pipeline, method):
    told = []
    result = made(
        pipeline,
        f"{method}:{ALWAYS[method]}",
        progress=lambda p: told.append(p.skipped) if p.stage == "denoise" else None,
    )
    run, skipped = pipeline.components.passes
    assert run + skipped == 2 * STEPS
    assert skipped >= 4
    assert skipped % 2 == 0  # one decision for both branches
    assert told[-1] == skipped
    assert told == sorted(told)
    assert np.isfinite(np.array(result)).all()
    assert not mx.array_equal(result, made(pipeline))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_for_the_next_image(pipeline, method):
    cache = f"{method}:{ALWAYS[method]}"
    first = made(pipeline, cache, seed=1)
    made(pipeline, cache, seed=2)
    assert mx.array_equal(made(pipeline, cache, seed=1), first)
    plain = made(pipeline, seed=3)
    made(pipeline, cache, seed=2)
    assert mx.array_equal(made(pipeline, seed=3), plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_cancelled_image_leaves_the_pipeline_usable(pipeline, method):
    cache = f"{method}:{ALWAYS[method]}"
    expected = made(pipeline, cache)

    def cancel(progress):
        if progress.stage == "denoise" and progress.step == 5:
            progress.cancel()

    with pytest.raises(Cancelled):
        made(pipeline, cache, progress=cancel)
    assert mx.array_equal(made(pipeline, cache), expected)


@pytest.mark.parametrize("method", METHODS)
def test_streamed_layers_give_the_same(pipeline, method):
    cache = f"{method}:{ALWAYS[method]}"
    expected, layers = made(pipeline, cache), []
    with keeping(pipeline, {"transformer"}, pipeline.strip_pixels):
        result = made(pipeline, cache, progress=lambda p: layers.append(p.step) if p.stage == "layer" else None)
    assert mx.array_equal(result, expected)
    assert max(layers) == pipeline.transformer_config.num_layers


def test_the_interval_of_guidance_and_a_cache(pipeline):
    """A branch that comes back has nothing to reuse: it is computed."""
    options = {"guidance_interval": "0.4:1"}
    assert mx.array_equal(made(pipeline, "first-block:0", **options), made(pipeline, **options))
    result = made(pipeline, "first-block:100", **options)
    assert np.isfinite(np.array(result)).all()
    assert pipeline.components.passes.run >= 4  # the first and the last step, and both branches of the first guided one


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_solvers_and_a_cache(pipeline, solver):
    assert mx.array_equal(made(pipeline, "taylorseer:0", solver=solver), made(pipeline, solver=solver))
    made(pipeline, "taylorseer:3", solver=solver)
    assert pipeline.components.passes.skipped > 0


def test_the_names_are_the_methods():
    assert tuple(METHODS) == CACHE_NAMES


def test_a_model_without_numbers_is_refused_before_anything_is_loaded(pipeline, monkeypatch):
    monkeypatch.setattr("qwen_image_mlx.pipeline.step_cache.facts_of", lambda components: CacheFacts())
    pipeline.release()
    parameters = GenerationParameters(width=64, height=64, num_inference_steps=STEPS, step_cache="teacache")
    with pytest.raises(RequestError, match="needs numbers of the model"):
        pipeline.denoise_latents(parameters, ENCODINGS[pipeline])
    assert not pipeline.is_loaded


def arrays_of(cache) -> dict[int, mx.array]:
    """The arrays that a cache holds, each once."""
    values = [one for value in vars(cache).values() for one in (value if isinstance(value, list) else [value])]
    return {id(value): value for value in values if isinstance(value, mx.array)}


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_has_what_is_kept(pipeline, method, cfg_scale, monkeypatch):
    """To the byte: the old arrays and the new ones when a pass has been computed, and never more in between."""
    kept, computed, skips = [0], METHODS[method].computed, METHODS[method].skips

    def counted(self, number, *found):
        before = arrays_of(self)
        computed(self, number, *found)
        kept.append(sum(array.nbytes for array in (before | arrays_of(self)).values()))

    def seen(self, number, *found):
        before = arrays_of(self)
        skipped = skips(self, number, *found)
        kept.append(sum(array.nbytes for array in (before | arrays_of(self)).values()))
        return skipped

    monkeypatch.setattr(METHODS[method], "computed", counted)
    monkeypatch.setattr(METHODS[method], "skips", seen)
    made(pipeline, f"{method}:{ALWAYS[method]}", cfg_scale=cfg_scale)

    def denoising(cache):
        work = Work(width=64, height=64, guided=cfg_scale > 1, step_cache=cache)
        return make_plan(pipeline.components, work).stages[2].peak

    assert max(kept) == denoising(method) - denoising(None)


def test_a_calibration_is_found_again(pipeline, monkeypatch):
    components = pipeline.components
    assert calibrated.facts_of(components) == CacheFacts()
    path = calibrated.write_facts(FACTS, components.snapshot.model, ())
    assert calibrated.facts_of(components) == FACTS
    for damaged in ("", "{}", "[1]", json.dumps({"teacache": {}, "magcache": {}}), "NaN", "x" * 200_000):
        path.write_text(damaged)
        assert calibrated.facts_of(components) == CacheFacts()


def test_released_facts_have_fifty_ratios():
    for facts in RELEASED.values():
        assert len(facts.ratios) == 50
        assert facts.ratios[0] == 1


@pytest.fixture
def caches(monkeypatch):
    """A weak reference to the cache of each image."""
    found, begin = [], CachedDenoiser.__init__

    def noted(self, denoiser, cache, *rest):
        found.append(weakref.ref(cache))
        begin(self, denoiser, cache, *rest)

    monkeypatch.setattr(CachedDenoiser, "__init__", noted)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_is_gone_with_its_image(pipeline, method, caches):
    """After whole images, a cancelled one and a streamed one, no cache is left, and none of its arrays."""

    def cancel(progress):
        if progress.stage == "denoise" and progress.step == 5:
            progress.cancel()

    cache = f"{method}:{ALWAYS[method]}"
    for cfg_scale in (4.0, 1.0):
        made(pipeline, cache, cfg_scale=cfg_scale)
    with contextlib.suppress(Cancelled):
        made(pipeline, cache, progress=cancel)
    with keeping(pipeline, {"transformer"}, pipeline.strip_pixels):
        made(pipeline, cache)
    gc.collect()
    assert [one() for one in caches] == [None] * 4


@pytest.mark.parametrize("method", METHODS)
def test_edits_batches_and_what_follows_a_cancelled_image(edits, method):
    """Each image is the one that a pipeline makes that has made nothing before it."""
    folder, fox, cat = edits
    parameters = GenerationParameters(
        width=64, height=64, num_inference_steps=STEPS, step_cache=f"{method}:{ALWAYS[method]}"
    )

    def opened():
        return QwenImagePipeline.from_pretrained(folder, dtype="float32")

    def cancel(progress):
        if progress.stage == "denoise" and progress.step == 6:
            progress.cancel()

    used = opened()
    batch = [used.denoise_latents(parameters, fox, seed=1, image_index=n) for n in range(2)]
    with pytest.raises(Cancelled):
        used.denoise_latents(parameters, fox, seed=2, progress=cancel)
    other = used.denoise_latents(parameters, cat, seed=1)
    assert used.components.passes.skipped > 0
    for n, latents in enumerate(batch):
        assert mx.array_equal(opened().denoise_latents(parameters, fox, seed=1, image_index=n), latents)
    assert mx.array_equal(opened().denoise_latents(parameters, cat, seed=1), other)
    assert not mx.array_equal(batch[0], other)
    assert not mx.array_equal(*batch)


@pytest.fixture(scope="module", params=["1.x", "2.1"])
def edits(request, tmp_path_factory):
    """A checkpoint that edits, and two encodings with a photo each, of different sizes."""
    folder = tmp_path_factory.mktemp("edits")
    made = write_edit(folder, "edit_plus") if request.param == "1.x" else write_checkpoint_21(folder)
    pipeline, noise = QwenImagePipeline.from_pretrained(made, dtype="float32"), np.random.default_rng(0)

    def encoded(prompt, *shape):
        photo = noise.integers(0, 256, (*shape, 3), np.uint8)
        return pipeline.encode_guidance_prompts(prompt, "blurry", images=[photo], reference_pixels=64 * 64)

    return made, encoded("a fox", 48, 64), encoded("a cat", 64, 80)
