"""What an app's author, or someone who comes from diffusers, meets: records, progress bars, names."""

from __future__ import annotations

import json

import pytest

from qwen_image_mlx import Preview, Progress, QwenImagePipeline, to_images
from qwen_image_mlx.images.files import METADATA_KEY, read_metadata

SMALL = {"width": 64, "height": 48, "num_inference_steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32")


@pytest.fixture(scope="module")
def image(pipeline):
    return pipeline.generate("a fox", progress=False, **SMALL)[0]


def test_images_carry_their_record(image):
    record = json.loads(image.info[METADATA_KEY])
    assert (record["prompt"], record["seed"], record["width"], record["steps"]) == ("a fox", 3, 64, 1)


def test_images_are_equal_by_their_pixels(pipeline, image):
    from PIL import Image

    plain = Image.frombytes(image.mode, image.size, image.tobytes())
    assert image == plain
    assert plain == image
    assert image != Image.new(image.mode, image.size)
    (other,) = pipeline.generate("another prompt", progress=False, **SMALL)
    assert image != other


@pytest.mark.parametrize(("name", "format"), [
    ("fox.png", None), ("fox.jpg", None), ("fox.webp", None), ("fox", "png"), ("fox", "JPEG"),
])  # fmt: skip
def test_saving_keeps_the_record(image, tmp_path, name, format):
    image.save(tmp_path / name, format)
    assert read_metadata(tmp_path / name) == json.loads(image.info[METADATA_KEY])


def test_saving_elsewhere_or_with_words_of_ones_own_works(image, tmp_path):
    image.save(tmp_path / "fox.bmp")
    with (tmp_path / "file.png").open("wb") as file:
        image.save(file, compress_level=1)
    assert read_metadata(tmp_path / "file.png")["seed"] == 3
    image.convert("L").save(tmp_path / "grey.png")
    assert (tmp_path / "fox.bmp").stat().st_size > 64 * 48


def test_bars_are_shown_unless_told_otherwise(pipeline, tiny, capfd):
    pipeline.generate("a fox", **SMALL | {"num_inference_steps": 2})
    assert "denoising 2/2, 00:00 left" in capfd.readouterr().err
    pipeline.generate("a fox", progress=False, **SMALL)
    assert capfd.readouterr().err == ""
    told: list[Progress] = []
    pipeline.generate("a fox", progress=told.append, **SMALL)
    QwenImagePipeline.from_pretrained(tiny, dtype="float32", progress=told.append).generate("a fox", **SMALL)
    assert sum(progress.stage == "denoise" and progress.step == 1 for progress in told) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("name", "ours"), [
    ("true_cfg_scale", "cfg_scale"), ("guidance_scale", "cfg_scale"), ("generator", "seed"),
    ("num_images_per_prompt", "num_images"), ("callback_on_step_end", "progress"), ("mask_image", "mask"),
])  # fmt: skip
def test_arguments_of_diffusers_are_answered(pipeline, name, ours):
    with pytest.raises(TypeError, match=rf"generate\(\) has no argument {name}: give {ours}$"):
        pipeline.generate("a fox", **{name: 1})


def test_other_names_are_python_s_own_error(pipeline, tiny):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        pipeline.generate("a fox", nonsense=1)
    with pytest.raises(TypeError, match="has no argument torch_dtype: give dtype"):
        QwenImagePipeline.from_pretrained(tiny, torch_dtype="float32")


def test_methods_of_diffusers_are_answered(pipeline):
    with pytest.raises(TypeError, match="call generate, edit or decompose"):
        pipeline("a fox")
    with pytest.raises(AttributeError, match=r"no load_lora_weights: give loras=\[…\] to from_pretrained"):
        pipeline.load_lora_weights("x")
    assert not hasattr(pipeline, "nonsense")


def test_what_apps_need_is_public():
    assert callable(to_images)
    assert callable(Preview)
