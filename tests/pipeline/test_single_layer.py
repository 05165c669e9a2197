"""One layer by its name, or painted: the sequence the model sees, the result, and refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from commands import error_line
from control_files import half_mask, picture

from qwen_image_mlx import QwenImagePipeline, RequestError
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.layers.formats import load_layers
from qwen_image_mlx.models.qwen_image.rope import place_images, text_start
from qwen_image_mlx.pipeline import generation
from qwen_image_mlx.runtime.memory_plan import work_of
from qwen_image_mlx.runtime.session import Session, layers_of
from qwen_image_mlx.variants import OWN
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

FAST = {"num_inference_steps": 1, "cfg_scale": 1, "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "tiny"
    return write_checkpoint(folder, TINY, pipeline="QwenImageLayeredPipeline")


@pytest.fixture
def small(tiny, monkeypatch):
    """A model that works at a small size."""
    from dataclasses import replace

    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    monkeypatch.setattr(
        pipeline.components, "variant", replace(pipeline.variant, resolutions=(64,), reference_area=64 * 64)
    )
    return pipeline


@pytest.fixture
def seen(monkeypatch):
    """The conditions that denoisers are made from."""
    found, made = [], generation.Conditions
    monkeypatch.setattr(generation, "Conditions", lambda **said: found.append(made(**said)) or found[-1])
    return found


def test_by_name_one_frame_is_generated_and_is_the_layer(small, seen):
    result = small.decompose(picture(64, 48), layer_prompt="the boat", **FAST)
    assert len(result.layers) == 1
    assert result.layers[0].size == (64, 48)
    assert result.prompt == "the boat"
    (conditions,) = seen
    assert (conditions.frames, len(conditions.references)) == (1, 1)
    assert result.stack.metadata["single_layer"] is True
    assert result.stack.metadata["num_layers"] == 1
    segments = place_images([(4, 4), (4, 4)], True)
    assert [segment.frame for segment in segments] == [0, -1]
    assert text_start(place_images([(1, 1), (1, 1)], True)) == 1, "as many as there are entries, less one"


def test_a_painted_mask_stands_between_the_layer_and_the_image(small, seen):
    """And no caption is written, though there is no prompt."""
    image = picture(64, 48)
    painted, other = (
        small.decompose(image, layer_mask=mask, **FAST) for mask in (half_mask(64, 48), half_mask(64, 48).rotate(180))
    )
    first, _ = seen
    mask, shown = (np.array(reference.latents) for reference in first.references)
    small.decompose(image, layer_prompt="the boat", **FAST)
    assert np.array_equal(shown, np.array(seen[-1].references[0].latents))
    assert not np.array_equal(mask, shown)
    assert [segment.frame for segment in place_images([(4, 4)] * 3, True)] == [0, 1, -1]
    assert not np.array_equal(painted.layers[0], other.layers[0])
    assert painted.prompt == ""


def test_without_either_the_layers_are_as_ever(small, seen):
    result = small.decompose(picture(64, 48), "a boat", num_layers=2, **FAST)
    assert (len(result.layers), seen[0].frames) == (2, 3)
    assert "single_layer" not in result.stack.metadata


def test_the_plan_counts_one_frame_and_the_mask(small):
    session = Session(small)
    asked = {"seed": 1, "steps": 2}
    whole = work_of(session.request(asked | {"prompt": "a"}, images=[picture(64, 48).convert("RGBA")]), small)
    one = work_of(
        session.request(asked | {"layer_mask": half_mask(64, 48)}, images=[picture(64, 48).convert("RGBA")]), small
    )
    assert (whole.frames, len(whole.shown), one.frames, len(one.shown)) == (5, 1, 1, 2)
    assert one.captioned == 0


@pytest.mark.parametrize(("said", "sentence"), [
    ({"layer_prompt": " "}, "the layer's prompt is empty"),
    ({"layer_prompt": "a boat", "prompt": "a lake"}, "not both"),
    ({"layer_mask": half_mask(64, 48).point(lambda value: 0)}, "the layer's mask is black everywhere"),
    ({"layer_mask": half_mask(10, 10)}, "the layer's mask has 10x10 pixels, but the image 64x48"),
])  # fmt: skip
def test_what_is_refused(said, sentence):
    with pytest.raises(RequestError, match=sentence):
        layers_of(picture(64, 48).convert("RGBA"), {"seed": 1, **said}, (64,))


def words_of(model):
    """A quick run of the command."""
    options = "--steps 1 --cfg-scale 1 --seed 1 --dtype float32 --quiet"
    return ["decompose", "lake.png", "--model", str(model), *options.split()]


def test_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(32, 32).save("lake.png")
    half_mask(32, 32).save("brush.png")
    half_mask(9, 9).save("small.png")
    words = words_of(tiny)
    monkeypatch.setattr("qwen_image_mlx.variants.LAYERED_RESOLUTIONS", (640, 1024))
    assert main([*words, "--layer-mask", "small.png", "-o", "no"]) == 2
    out, err = capsys.readouterr()
    assert "the layer's mask has 9x9" in error_line((2, out.splitlines(), err))
    assert main([*words, "--layer-prompt", "the boat", "--prompt", "x", "-o", "no"]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_of_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(32, 32).save("lake.png")
    half_mask(32, 32).save("brush.png")
    index = shutil.copytree(tiny, tmp_path / "small") / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_bytes()) | {OWN: {"resolutions": [64], "reference_area": 64**2}}))
    words = words_of("small")
    assert main([*words, "--layer-prompt", "the boat", "--layer-mask", "brush.png", "-o", "boat"]) == 0
    assert len(load_layers(tmp_path / "boat").layers) == 1
