"""Nothing lazy outlives a call: MLX's streams belong to threads, and an array of one cannot be evaluated in another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphs import primitives
from lora_files import TARGETS, write_lora
from mlx.utils import tree_flatten

from qwen_image_mlx import Cancelled, GenerationParameters, QwenImagePipeline
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("threads") / "model", TINY)


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread of its own."""
    found: dict[str, Any] = {}

    def call() -> None:
        try:
            found["value"] = function()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if "error" in found:
        raise found["error"]
    return found["value"]


def pixels(pipeline, cancel_at=None, steps=STEPS):
    def watch(progress):
        if (progress.stage, progress.step) == cancel_at:
            progress.cancel()

    parameters = GenerationParameters(width=64, height=48, num_inference_steps=steps, cfg_scale=3.0)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
    return np.array(pipeline.generate_pixels(parameters, encoding, seed=1, progress=watch))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [(), ("transformer", "text_encoder")], ids=["resident", "streamed"])
@pytest.mark.parametrize("cancel_at", [("denoise", 0), ("denoise", 2), ("layer", 1)], ids=str)
def test_cancelled_in_one_thread_and_repeated_in_another(model, cancel_at, streamed):
    expected = pixels(QwenImagePipeline.from_pretrained(model))
    pipeline = QwenImagePipeline.from_pretrained(model, streamed=streamed)
    with pytest.raises(Cancelled):
        in_thread(lambda: pixels(pipeline, cancel_at))
    np.testing.assert_array_equal(in_thread(lambda: pixels(pipeline)), expected)
    np.testing.assert_array_equal(pixels(pipeline), expected)


@pytest.mark.slow
def test_what_a_call_returns_belongs_to_no_thread(model):
    pipeline = QwenImagePipeline.from_pretrained(model)
    image = np.zeros((48, 64, 3), np.uint8)
    parameters = GenerationParameters(width=64, height=48, num_inference_steps=1)

    def results():
        encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
        initial = pipeline.encode_initial_image(image, (64, 48), image[..., 0])
        latents = pipeline.denoise_latents(parameters, encoding)
        frames = list(pipeline.decode_frames(parameters, latents))
        made = [encoding.positive, encoding.negative, initial.mean, initial.std, initial.mask, latents, *frames]
        return [*made, pipeline.generate_pixels(parameters, encoding)]

    for array in in_thread(results):
        assert not primitives(array)
        array.tolist()


@pytest.mark.slow
def test_one_thread_s_table_serves_the_others(model):
    pipeline = QwenImagePipeline.from_pretrained(model)
    first = in_thread(lambda: pixels(pipeline))
    assert not [name for name in primitives(pipeline.components.kept["modulation table"][1]) if name]
    np.testing.assert_array_equal(in_thread(lambda: pixels(pipeline)), first)


@pytest.mark.slow
def test_loras_put_beside_in_one_thread_run_in_another(model, tmp_path):
    pipeline = QwenImagePipeline.from_pretrained(model, lora_mode="side")
    pixels(pipeline)
    file = write_lora(tmp_path / "lora.safetensors", pipeline.components.lora_targets(), targets=TARGETS)
    in_thread(lambda: pipeline.set_loras([file], "side"))
    assert pipeline.is_transformer_loaded
    assert not primitives([array for _, array in tree_flatten(pipeline.components.network("transformer").parameters())])
    expected = pixels(QwenImagePipeline.from_pretrained(model, loras=[file], lora_mode="side"))
    np.testing.assert_array_equal(in_thread(lambda: pixels(pipeline)), expected)
