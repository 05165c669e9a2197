"""Golden files: written by diffusers from a tiny checkpoint, compared with it, with a falsified one, and refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.doctor.golden import FORMAT, PARTS, THUMBNAIL, VALUES, read_golden, run
from qwen_image_mlx.errors import CheckpointError

pytestmark = pytest.mark.reference

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_golden.py"
STAGES = ["text", "text-negative", "noise", "latents-1", "latents-2", "latents-3", "image"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make(tiny, script, tmp_path_factory):
    def make(*flags, dtype="float32"):
        path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
        size = ["--width", "64", "--height", "96", "--steps", "3", "--seed", "7", "--prompt", "A red fox"]
        script.main([str(tiny), str(path), *size, "--device", "cpu", "--dtype", dtype, *flags])
        return path

    return make


@pytest.fixture(scope="module")
def golden(make):
    return make()


def compared(path, model):
    return run({"golden": str(path), "model": str(model)})


def test_the_script_and_the_reader_agree(script):
    assert (script.FORMAT, script.VALUES, script.PARTS, script.THUMBNAIL) == (FORMAT, VALUES, PARTS, THUMBNAIL)


def test_a_right_model_agrees_at_every_stage(golden, tiny):
    assert golden.stat().st_size < 200_000
    outcome = compared(golden, tiny)
    assert outcome.findings == []
    assert [name.rpartition("_")[0] for name in outcome.figures if name != "golden"] == STAGES
    assert "7 stages" in outcome.summary


def test_bf16_agrees_within_its_own_tolerance(make, tiny):
    outcome = compared(make("--cfg-scale", "1", "--keep", "2", dtype="bfloat16"), tiny)
    assert outcome.findings == []
    assert set(outcome.figures) == {"text_error", "noise_error", "latents-2_error", "image_levels", "golden"}
    assert outcome.figures["latents-2_error"] > 1e-3


@pytest.mark.parametrize(("part", "tensor", "stage"), [
    ("text_encoder", "model.layers.1.mlp.down_proj.weight", "text"),
    ("transformer", "transformer_blocks.1.attn.to_q.weight", "latents-1"),
    ("vae", "decoder.conv_out.weight", "image"),
])  # fmt: skip
def test_a_falsified_tensor_is_found_at_its_stage(golden, tiny, tmp_path, part, tensor, stage):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = (model / part).glob("*.safetensors")
    tensors, metadata = mx.load(str(file), return_metadata=True)
    (name,) = [name for name in tensors if name.endswith(tensor)]
    tensors[name] = tensors[name] * 1.1
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors, metadata)
    outcome = compared(golden, model)
    found = outcome.as_dict()
    assert found["verdict"] == "wrong"
    assert found["sentence"].startswith(f"{model}: first departure: {stage} departs from the reference by ")


def test_another_seed_is_found_in_the_noise(golden, tiny, tmp_path):
    path = changed(golden, tmp_path, seed=8)
    assert "first departure: noise" in compared(path, tiny).as_dict()["sentence"]


def changed(golden, folder, **said):
    """The file with other words about how it was made."""
    arrays, metadata = mx.load(str(golden), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    metadata["golden"] = json.dumps(json.loads(metadata["golden"]) | said)
    path = folder / "changed.safetensors"
    mx.save_safetensors(str(path), arrays, metadata)
    return path


def test_another_prompt_is_found_in_the_text(golden, tiny, tmp_path):
    path = changed(golden, tmp_path, prompt="A much longer prompt about a blue whale")
    found = compared(path, tiny).as_dict()
    assert "first departure: text departs" in found["sentence"]


def test_another_model_is_refused(golden, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="from a different model: num_layers is 60 there and 2 here"):
        compared(changed(golden, tmp_path, transformer={"num_layers": 60}), tiny)


def test_another_class_is_refused(golden, tiny):
    with pytest.raises(CheckpointError, match="class is QwenImagePipeline there and QwenImageEditPlusPipeline here"):
        compared(golden, "demo-edit")


@pytest.mark.parametrize("said", [
    {"kept_steps": ["1"]}, {"kept_steps": 3}, {"prompt": None}, {"versions": None}, {"transformer": []},
    {"cfg_scale": "4"}, {"seed": 1.5}, {"dtype": ["float32"]}, {"negative_prompt": 7},
], ids=str)  # fmt: skip
def test_words_of_other_types_are_refused(golden, tiny, tmp_path, said):
    with pytest.raises(CheckpointError, match="damaged"):
        compared(changed(golden, tmp_path, **said), tiny)


@pytest.mark.parametrize(("model", "said"), [("edit", "is for QwenImageEditPipeline"), ("nowhere", "cannot be opened")])
def test_the_script_refuses_what_it_cannot_run(script, tmp_path, capsys, model, said):
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit" / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    path = tmp_path / "golden.safetensors"
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / model), str(path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "words", "array", "size"])
def test_what_is_no_golden_file_is_refused(golden, tiny, tmp_path, damage):
    path = tmp_path / "golden.safetensors"
    if damage == "cut":
        path.write_bytes(golden.read_bytes()[:500])
    if damage == "other":
        mx.save_safetensors(str(path), {"image": mx.zeros((2, 2))})
    if damage == "words":
        path = changed(golden, tmp_path, dtype="int8")
    if damage == "array":
        path = changed(golden, tmp_path, kept_steps=[1, 2, 3, 4])
    if damage == "size":
        path = changed(golden, tmp_path, width=65)
    with pytest.raises(CheckpointError, match=r"scripts/make_golden\.py"):
        compared(path, tiny)


def test_a_golden_file_tells_how_it_was_made(golden, tiny):
    said = read_golden(golden).facts
    assert said["model"] == tiny.name
    assert str(tiny.parent) not in json.dumps(said)
    assert said["kept_steps"] == [1, 2, 3]
    assert {"torch", "diffusers", "transformers"} <= said["versions"].keys()
    assert np.all(read_golden(golden).arrays["image"] <= 255)
