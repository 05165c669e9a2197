"""Checkpoints of unusual size that say so, and the models inside the package that share their parts."""

from __future__ import annotations

import json

import pytest

from qwen_image_mlx import CheckpointError, QwenImagePipeline
from qwen_image_mlx.variants import ASPECT_SIZES, OWN, VARIANTS, variant_of
from qwen_image_mlx.weights import snapshot
from qwen_image_mlx.weights.snapshot import HubSnapshot
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint


@pytest.fixture
def own(tmp_path):
    """A tiny checkpoint that says something of itself."""

    def write(**said):
        folder = write_checkpoint(tmp_path / "model", TINY)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {OWN: said}))
        return folder

    return write


def test_a_small_model_generates_at_its_own_size(own):
    pipeline = QwenImagePipeline.from_pretrained(own(target_area=64**2, steps=2, cfg_scale=1.0), dtype="float32")
    assert pipeline.recommended[:2] == (2, 1.0)
    (image,) = pipeline.generate("a fox")
    assert image.size == (64, 64)


@pytest.mark.parametrize("aspect", ASPECT_SIZES)
def test_sizes_keep_the_aspect_at_the_model_s_area(aspect):
    usual = VARIANTS["QwenImagePipeline"]
    assert usual.size_of(aspect) == ASPECT_SIZES[aspect]
    wanted = ASPECT_SIZES[aspect]
    width, height = variant_of({"_class_name": "QwenImagePipeline", OWN: {"target_area": 256**2}}, "").size_of(aspect)
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(256**2, rel=0.12)
    assert width / height == pytest.approx(wanted[0] / wanted[1], rel=0.12)


@pytest.mark.parametrize(("said", "says"), [
    ({"template": "x"}, "may only say"),
    ({"steps": "many"}, "gives steps as 'many'"),
    ({"steps": True}, "gives steps as True"),
    ({"resolutions": 64}, "gives resolutions"),
    ([], "may only say"),
])  # fmt: skip
def test_what_a_model_cannot_say_of_itself_is_refused(said, says):
    with pytest.raises(CheckpointError, match=says):
        variant_of({"_class_name": "QwenImageLayeredPipeline", OWN: said}, "model")


def test_demos_share_what_they_do_not_have_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "DEMO_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)  # where a folder has a demo's name
    for name in ("demo/model_index.json", "shared/vae/config.json", "demo-edit/vae/config.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name}))
    demo, edit = HubSnapshot("demo"), HubSnapshot("demo-edit")
    assert demo.is_local
    assert demo.read_json("model_index.json")["name"] == "demo/model_index.json"
    assert demo.read_json("vae/config.json")["name"] == "shared/vae/config.json"
    assert edit.read_json("vae/config.json")["name"] == "demo-edit/vae/config.json"
    assert (demo.names("vae"), demo.names("transformer")) == (["vae/config.json"], [])
    assert not edit.exists("model_index.json")
