"""What MLX is asked to do, and in which order: results that are finished before they are read, limits, pace."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx import Cancelled, GenerationParameters, QwenImagePipeline
from qwen_image_mlx.gpu import Pace
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.pipeline import limits as limits_module
from qwen_image_mlx.pipeline.limits import limits
from qwen_image_mlx.weights.safetensors_files import save_tensors
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=3, cfg_scale=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("runtime") / "model", TINY)


@pytest.fixture
def calls(monkeypatch):
    """The names of MLX's calls that matter here, in order; each is done as ever."""
    order = []

    def note(place, name):
        original = getattr(place, name)

        def call(*arguments, **options):
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    for name in ("eval", "async_eval", "synchronize", "isfinite", "save_safetensors", "set_wired_limit", "clear_cache",
                 "set_cache_limit", "set_memory_limit"):  # fmt: skip
        note(mx, name)
    return order


@pytest.fixture
def reads(calls, monkeypatch):
    """What was called before each time that a number is read."""
    found = []
    original = mx.array.item

    def item(array):
        found.append(tuple(call for call in calls if call in ("eval", "synchronize"))[-2:])
        return original(array)

    monkeypatch.setattr(mx.array, "item", item)
    return found


def test_results_are_finished_before_they_are_read(model, calls, reads):
    pipeline = QwenImagePipeline.from_pretrained(model)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
    assert reads == [("eval", "synchronize")] * 2, "each prompt's states are finite"
    pixels = pipeline.generate_pixels(PARAMETERS, encoding)
    assert reads == [("eval", "synchronize")] * 4, "and so are latents and pixels"
    calls.clear()
    to_images(pixels)
    assert calls == ["eval", "synchronize"]


def test_arrays_are_finished_before_they_are_saved(tmp_path, calls):
    save_tensors(tmp_path / "x.safetensors", {"x": mx.ones(3) * 2}, {})
    assert calls == ["eval", "synchronize", "save_safetensors"]


def test_a_fault_of_the_gpu_is_raised_where_the_result_would_be_read(model, monkeypatch):
    """MLX stores a failed command buffer's error and raises it when it synchronizes."""
    pipeline = QwenImagePipeline.from_pretrained(model)
    encoding = pipeline.encode_guidance_prompts("a fox")

    def fail():
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(Exception, match="Insufficient Memory") as caught:
        pipeline.generate_pixels(PARAMETERS, encoding)
    assert type(caught.value).__name__ == "GPUError"
    assert not pipeline.is_text_encoder_loaded, "what is loaded may hold zeros"
    assert not pipeline.is_transformer_loaded
    monkeypatch.undo()
    assert np.isfinite(np.array(pipeline.generate_pixels(PARAMETERS, encoding))).all()


# Limits --------------------------------------------------------------------------------------------------------------


def now():
    found = mx.set_cache_limit(1 << 40), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(found[0])
    mx.set_memory_limit(found[1])
    return found


def test_the_api_s_own_calls_keep_to_limits_and_put_them_back(model):
    pipeline, seen, outside = QwenImagePipeline.from_pretrained(model), [], now()
    pipeline.generate("a fox", width=64, height=48, num_inference_steps=1, progress=lambda _: seen.append(now()))
    assert now() == outside
    ((cache, memory),) = set(seen)
    assert memory <= limits_module.usable_memory() * 1.2
    assert cache <= memory / 2


@pytest.mark.slow
def test_an_app_s_own_tighter_limits_stay(model):
    outside = mx.set_cache_limit(64 << 20), mx.set_memory_limit(3 << 30)
    try:
        pipeline, seen = QwenImagePipeline.from_pretrained(model), []
        pipeline.generate("a fox", width=64, height=48, num_inference_steps=1, progress=lambda _: seen.append(now()))
        assert set(seen) == {(64 << 20, 3 << 30)}
        assert now() == (64 << 20, 3 << 30)
    finally:
        mx.set_cache_limit(outside[0])
        mx.set_memory_limit(outside[1])


def test_calls_that_overlap_leave_mlx_as_it_was():
    """As two threads may: the first ends before the second."""
    outside, one, other = now(), limits(8 * GB), limits(12 * GB)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert now() == outside


GB = 10**9


@pytest.fixture
def mac(monkeypatch):
    """Makes this machine a Mac with so much memory, of which Metal recommends some."""

    def become(size, recommended):
        info = {"memory_size": size, "max_recommended_working_set_size": recommended}
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda device=None: info if device == mx.gpu else {})

    return become


@pytest.mark.parametrize("wire", [False, True])
def test_nothing_is_wired_unless_it_is_wanted(model, calls, mac, wire, monkeypatch):
    monkeypatch.setattr(mx, "set_wired_limit", lambda nbytes: calls.append("set_wired_limit") or 0)
    mac(64 << 30, 51 * GB)
    with limits(20 * GB, wire=wire):
        pass
    assert calls.count("set_wired_limit") == (2 if wire else 0)
    QwenImagePipeline.from_pretrained(model).generate("a fox", width=64, height=48, num_inference_steps=1)
    assert calls.count("set_wired_limit") == (2 if wire else 0)


@pytest.mark.parametrize(("gib", "recommended", "usable"), [
    (8, 5.73, 4.59), (16, 11.45, 10.3), (18, 13.4, 12.06), (24, 17.18, 15.46), (32, 22.9, 20.6), (64, 51.5, 46.4),
])  # fmt: skip
def test_a_mac_keeps_memory_for_itself(mac, gib, recommended, usable):
    mac(gib << 30, int(recommended * GB))
    assert limits_module.usable_memory() == pytest.approx(usable * GB, rel=0.005)


def test_the_cache_keeps_what_a_plan_works_with(mac):
    mac(32 << 30, 23 * GB)
    for budget, working, cache in ((20 * GB, 2 * GB, 3 * GB), (20 * GB, 0, 3 << 29), (20 * GB, 15 * GB, 10 * GB)):
        outside = now()
        with limits(budget, working):
            assert now() == (cache, min(budget, outside[1]))


# Pace ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unfinished", [1, 2, 3])
def test_no_more_layers_are_queued_than_allowed(calls, unfinished):
    pace = Pace(unfinished=unfinished)
    x = mx.zeros(4)
    for _ in range(6):
        x = x + 1
        pace([x])
    assert calls == ["async_eval"] * unfinished + ["async_eval", "eval"] * (6 - unfinished)
    assert x.tolist() == [6] * 4


@pytest.mark.slow
def test_each_layer_is_waited_for_by_something_that_it_made(tmp_path, monkeypatch):
    """The last block hands its text on as it is: finished long ago, it would stand for nothing."""
    configs = {**TINY, "transformer": replace(TINY["transformer"], num_layers=4)}
    pipeline = QwenImagePipeline.from_pretrained(write_checkpoint(tmp_path / "deep", configs))
    encoding, queued = pipeline.encode_guidance_prompts("a fox", "blurry"), []
    original = Pace.__call__

    def call(pace, arrays):
        queued.append([id(array) for array in arrays])
        held.append(arrays)  # so that no identity is used again
        original(pace, arrays)

    held = []
    monkeypatch.setattr(Pace, "__call__", call)
    pipeline.denoise_latents(PARAMETERS, encoding)
    assert len(queued) == 3 * 4
    ids = [one for layer in queued for one in layer]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_layers_are_told_in_their_order_and_a_step_can_be_cancelled_between_two(model):
    pipeline = QwenImagePipeline.from_pretrained(model)
    encoding, seen = pipeline.encode_guidance_prompts("a fox", "blurry"), []
    pipeline.generate_pixels(PARAMETERS, encoding, progress=seen.append)
    told = [(p.stage, p.step, p.total) for p in seen if p.stage in ("layer", "denoise")]
    steps = [[("layer", 1, 2), ("layer", 2, 2), ("denoise", n, 3)] for n in (1, 2, 3)]
    assert told == [("denoise", 0, 3), *(event for step in steps for event in step)]

    def cancel(progress):
        seen.append(progress)
        if (progress.stage, progress.step) == ("layer", 1):
            progress.cancel()

    seen.clear()
    with pytest.raises(Cancelled):
        pipeline.generate_pixels(PARAMETERS, encoding, progress=cancel)
    assert [p.step for p in seen if p.stage == "denoise"] == [0]
    assert np.isfinite(np.array(pipeline.generate_pixels(PARAMETERS, encoding))).all()
