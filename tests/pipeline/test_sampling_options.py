"""Options of sampling by keyword: the table's names and types, the command line's images and records, and errors."""

from __future__ import annotations

import json
from typing import get_type_hints

import pytest

from qwen_image_mlx import GenerationParameters, QwenImagePipeline, RequestError, SamplingOptions
from qwen_image_mlx.images.files import METADATA_KEY
from qwen_image_mlx.names import PresetName
from qwen_image_mlx.pipeline.parameters import TASKS
from qwen_image_mlx.runtime.options import OPTIONS

# Options of every task that lines of a file of prompts have too, and that the calls name in their signatures.
NAMED = {"prompt", "negative_prompt", "steps", "cfg_scale", "seed", "rng"}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32", progress=lambda progress: None)


def small(pipeline, **options):
    return pipeline.generate("a fox", **{"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3} | options)


def record(image) -> dict:
    return json.loads(image.info[METADATA_KEY])


def test_they_are_the_table_s_with_the_parameters_types():
    rows = {row.name for row in OPTIONS.values() if row.line and {*TASKS} <= {*row.tasks}}
    ours, theirs = get_type_hints(SamplingOptions), get_type_hints(GenerationParameters)
    assert rows - NAMED == ours.keys()
    assert ours.pop("preset") == PresetName | None
    assert ours.pop("guidance_interval") == tuple[float, float] | theirs["guidance_interval"]
    assert {name: theirs[name] | None for name in ours} == ours


@pytest.mark.parametrize(("options", "recorded"), [
    ({"solver": "unipc"}, {"solver": "unipc"}),
    ({"guidance_interval": (0, 0.5)}, {"guidance_interval": "0:0.5"}),
    ({"guidance_interval": "0.5:1"}, {"guidance_interval": "0.5:1"}),
    ({"cfg_zero_star": True}, {"cfg_zero_star": True}),
    ({"apg": 0}, {"apg": 0.0}),
    ({"num_inference_steps": 9, "step_cache": "taylorseer"}, {"step_cache": "taylorseer"}),
    ({"num_inference_steps": None, "preset": "draft"}, {"preset": "draft", "steps": 12}),
    ({"num_inference_steps": 3, "preset": "draft"}, {"preset": "draft", "steps": 3}),
    ({"solver": None, "apg": None, "preset": None}, {}),
])  # fmt: skip
def test_each_is_done_and_recorded(pipeline, options, recorded):
    (image,) = small(pipeline, negative_prompt="blurry", **options)
    found = record(image)
    names = SamplingOptions.__annotations__.keys()
    assert {name: value for name, value in found.items() if name in names} | recorded == {
        name: found[name] for name in recorded
    }
    plain = {name: value for name, value in options.items() if name not in names}
    if recorded.keys() & names - {"preset"}:
        assert small(pipeline, negative_prompt="blurry", **plain)[0] != image


@pytest.mark.parametrize(("options", "said"), [
    ({"solver": "magic"}, "solver is 'magic', but must be one of euler"),
    ({"preset": "fast"}, "preset is 'fast', but must be one of draft, balanced, best"),
    ({"guidance_interval": (0.9, 0.1)}, "guidance_interval is '0.9:0.1', but must be like 0.1:0.9"),
    ({"guidance_interval": (0.1,)}, "guidance_interval is '0.1', but must be like"),
    ({"apg": True}, "apg is True, but must be a number"),
    ({"apg": 0.3, "cfg_zero_star": True}, "choose one"),
    ({"step_cache": "first-block"}, "useless with 2 steps"),
    ({"num_inference_steps": 9, "step_cache": "teacache"}, "needs numbers of the model"),
])  # fmt: skip
def test_wrong_values_are_refused_before_anything_is_loaded(tiny, options, said, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", progress=lambda progress: None)
    with pytest.raises(RequestError, match=said):
        small(pipeline, negative_prompt="blurry", **options)
    assert not pipeline.is_loaded


@pytest.mark.parametrize("options", [{"cfg_zero_star": True}, {"apg": 0.0, "cfg_scale": 4.0}])
def test_guidance_without_a_negative_prompt_is_refused(pipeline, options):
    with pytest.raises(RequestError, match="guidance is off; it needs a negative prompt"):
        small(pipeline, **options)


@pytest.mark.parametrize(("name", "near"), [
    ("solvers", "solver"), ("stepcache", "step_cache"), ("num_inference_step", "num_inference_steps"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(pipeline, name, near):
    with pytest.raises(
        TypeError, match=rf"generate\(\) got an unexpected keyword argument '{name}'; did you mean {near}\?"
    ):
        small(pipeline, **{name: 1})


def test_edits_and_layers_take_them():
    for method in (QwenImagePipeline.generate, QwenImagePipeline.edit, QwenImagePipeline.decompose):
        assert method.__annotations__["options"] == "Unpack[SamplingOptions]"
