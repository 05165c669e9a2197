"""Previews: what a step is heading for, from its latents alone, and the file that a command keeps meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from qwen_image_mlx import CheckpointError, GenerationParameters, Progress, QwenImagePipeline
from qwen_image_mlx.cli import preview as preview_module
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.cli.preview import preview_file
from qwen_image_mlx.pipeline.conductor import encode_canvas, encode_request, generate_encoded
from qwen_image_mlx.pipeline.decomposition import layers_request
from qwen_image_mlx.pipeline.image_request import canvas_of
from qwen_image_mlx.pipeline.request import Request
from qwen_image_mlx.runtime.preview import Preview
from qwen_image_mlx.sampling.latents import LatentSpace, pack_multi_layer_latents
from qwen_image_mlx.variants import OWN, VARIANTS, WAN_PREVIEW, variant_of

PROMPT = "a red circle on a blue background"
DEMOS = ("demo", "demo-edit", "demo-layered")


class Checkpoint:
    """As much of a pipeline as a preview looks at."""

    def __init__(self, kind="QwenImagePipeline", **changed):
        self.variant = replace(VARIANTS[kind], **changed)
        self.latent_space = LatentSpace(channels=16, factor=8, patch=2, size_multiple=16, pixel_channels=3)


def request(width=64, height=48, steps=12, **more) -> Request:
    parameters = GenerationParameters(width=width, height=height, num_inference_steps=steps, **more)
    return Request(prompt=PROMPT, negative_prompt=" ", parameters=parameters, seeds=(1,))


def told(reports):
    """The progress of a loop that points to these clean latents, one after each step."""
    yield Progress("denoise", 0, len(reports), sigma=1.0, latents=reports[0])
    for step, denoised in enumerate(reports, start=1):
        yield Progress("denoise", step, len(reports), sigma=0.5, latents=denoised, denoised=denoised)


def shown(pipeline, wanted, reports):
    """What a preview shows of the clean latents that steps point to."""
    found = []
    preview = Preview(lambda *what: found.append(what), None, pipeline, wanted)
    for progress in told(reports):
        preview(progress)
    return found


def small(image: Image.Image) -> np.ndarray:
    """Means of 8x8 pixels, in [0, 1]."""
    values = np.asarray(image.convert("RGB"), np.float64) / 255
    height, width, _ = values.shape
    return values.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(1 / np.mean((a - b) ** 2))


# --- the image ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
def test_colours_are_the_linear_map_of_the_clean_latents_at_every_step(patch):
    checkpoint = Checkpoint()
    checkpoint.latent_space = space = replace(checkpoint.latent_space, factor=16 // patch, patch=patch)
    latents = mx.random.normal((1, 1, 48 // space.factor, 64 // space.factor, 16), key=mx.random.key(1))
    expected = np.array(latents[0, 0]) @ np.array(WAN_PREVIEW[:-1]) + np.array(WAN_PREVIEW[-1])
    expected = np.clip((expected + 1) / 2, 0, 1)
    found = shown(checkpoint, request(), [space.pack_frames(latents)] * 3)
    assert [(step, total) for _, step, total in found] == [(1, 3), (2, 3), (3, 3)]
    for image, _, _ in found:
        assert (image.mode, image.size) == ("RGB", (64, 48))
        small = np.asarray(image.resize(expected.shape[1::-1], Image.Resampling.BOX)) / 255
        assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.95  # but for the bicubic way up
        assert image.tobytes() == found[0][0].tobytes()


@pytest.mark.parametrize(("size", "expected"), [
    ((64, 64), (64, 64)),
    ((1024, 1024), (512, 512)),
    ((1664, 928), (512, 286)),
    ((4096, 4096), (512, 512)),
])  # fmt: skip
def test_previews_are_small(size, expected):
    width, height = size
    clean = mx.zeros((1, width * height // 256, 64))
    ((image, _, _),) = shown(Checkpoint(), request(width, height), [clean])
    assert image.size == expected


def test_layers_are_tiled_back_to_front_without_the_frame_of_everything():
    levels = mx.array([9.0, -1.0, -0.5, 0.5])[:, None, None, None]
    clean = pack_multi_layer_latents(mx.broadcast_to(levels, (4, 4, 4, 16))[None])
    grey = (*([(1 / 16, 1 / 16, 1 / 16)] * 16), (0.0, 0.0, 0.0))
    checkpoint = Checkpoint("QwenImageLayeredPipeline", preview=grey)
    wanted = request(32, 32, num_layers=3)
    ((image, _, _),) = shown(checkpoint, wanted, [clean])
    assert image.size == (64, 64)
    values = [image.getpixel(place)[0] for place in ((8, 8), (56, 8), (8, 56), (56, 56))]
    assert values == pytest.approx([0, 64, 191, 255], abs=2)


def test_progress_is_handed_on_first_and_nothing_else_is_shown():
    seen = []
    preview = Preview(lambda *what: seen.append("shown"), lambda p: seen.append(p.stage), Checkpoint(), request())
    for progress in (Progress("load", 0, 1, "transformer"), *told([mx.zeros((1, 12, 64))]), Progress("decode", 0, 1)):
        preview(progress)
    assert seen == ["load", "denoise", "denoise", "shown", "decode"]


# --- of what models generate ---


def generated(pipeline, wanted, encoding, initial=None):
    found = []
    watch = Preview(lambda image, *_: found.append(image), None, pipeline, wanted)
    pictures = [image for image, _, _ in generate_encoded(pipeline, wanted, encoding, initial, watch)]
    return found, pictures


@pytest.mark.slow
def test_the_demo_s_previews_come_to_resemble_the_image():
    pipeline = QwenImagePipeline.from_pretrained("demo", dtype="float32")
    wanted = request(64, 64, cfg_scale=3.0)
    encoding, reports = encode_request(pipeline, wanted), []
    found, (image,) = generated(pipeline, wanted, encoding)
    likeness = [psnr(small(preview), small(image)) for preview in found]
    assert len(found) == 12
    assert likeness[-1] > 22
    assert likeness[5] > 22 > 18 > likeness[0]
    list(generate_encoded(pipeline, wanted, encoding, None, lambda told: reports.append(told.denoised)))
    other = shown(Checkpoint(preview=WAN_PREVIEW), wanted, [denoised for denoised in reports if denoised is not None])
    assert psnr(small(other[-1][0]), small(image)) < 16, "another model's map shows something else"


@pytest.mark.slow
def test_what_a_mask_keeps_is_there_from_the_first_step():
    pipeline = QwenImagePipeline.from_pretrained("demo", dtype="float32")
    image = Image.new("RGB", (64, 64), (40, 90, 200))
    image.paste((230, 200, 40), (0, 0, 64, 24))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 40, 64, 64))
    canvas = canvas_of(pipeline.variant, [image], mask=mask, size=(64, 64))
    wanted = replace(request(64, 64, strength=1.0), canvas=canvas)
    found, _ = generated(pipeline, wanted, encode_request(pipeline, wanted), encode_canvas(pipeline, wanted))
    first, kept = small(found[0])[:4], small(image)[:4]
    assert psnr(first, kept) > 20


@pytest.mark.slow
def test_an_edit_shows_its_target_alone():
    pipeline = QwenImagePipeline.from_pretrained("demo-edit", dtype="float32")
    image = Image.new("RGB", (64, 64), (40, 90, 200))
    canvas = canvas_of(pipeline.variant, [image])
    wanted = replace(request(64, 64, cfg_scale=1.0), prompt="make it green", images=(image,), canvas=canvas)
    found, (image,) = generated(pipeline, wanted, encode_request(pipeline, wanted))
    assert found[-1].size == (64, 64)
    assert psnr(small(found[-1]), small(image)) > 20


@pytest.mark.slow
def test_a_decomposition_shows_its_layers():
    pipeline = QwenImagePipeline.from_pretrained("demo-layered", dtype="float32")
    image = Image.new("RGBA", (64, 64), (40, 90, 200, 255))
    image.paste((230, 40, 40, 255), (20, 20, 44, 44))
    wanted = layers_request(
        image, PROMPT, negative_prompt=None, num_layers=2, resolution=None, resolutions=(64,), size="source",
        cfg_normalize=False, caption_language="en", seed=1, rng="torch", sampling=pipeline.recommended._asdict(),
    )  # fmt: skip
    found, layers = generated(pipeline, wanted, encode_request(pipeline, wanted))
    assert found[-1].size == (128, 64)
    white = Image.new("RGBA", (64, 64), "white")
    laid = np.concatenate([small(Image.alpha_composite(white, layer)) for layer in layers], axis=1)
    assert np.corrcoef(small(found[-1]).ravel(), laid.ravel())[0, 1] > 0.7


# --- the map --------------------------------------------------------------------------------------------------------


def test_the_demos_say_how_their_latents_are_shown():
    for name in DEMOS:
        index = json.loads((Path(preview_module.__file__).parents[1] / "demo" / name / "model_index.json").read_text())
        assert variant_of(index, name).preview != WAN_PREVIEW, name
    assert variant_of({"_class_name": "QwenImagePipeline"}, "released").preview == WAN_PREVIEW


@pytest.mark.parametrize("said", [
    [[0.0] * 3] * 16,
    [[0.0] * 4] * 17,
    [[0.0] * 3] * 16 + [[0.0, 0.0, "x"]],
    [[0.0] * 3] * 16 + [[0.0, 0.0, float("nan")]],
    [0.0] * 17,
])  # fmt: skip
def test_a_map_of_another_shape_is_refused(said):
    with pytest.raises(CheckpointError, match="17 rows of 3"):
        variant_of({"_class_name": "QwenImagePipeline", OWN: {"preview": said}}, "model")


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_file_is_there_while_it_generates_and_gone_afterwards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    whole = Preview.__call__

    def watched(self, progress):
        whole(self, progress)
        if progress.stage == "denoise" and progress.step:
            seen.append(Image.open("fox-preview.png").copy().tobytes())

    monkeypatch.setattr(Preview, "__call__", watched)
    code = main(["generate", PROMPT, "--model", "demo", "--seed", "1", "-o", "fox.png", "--preview"])
    out, err = capsys.readouterr()
    assert (code, out.split(), err.count("preview: fox-preview.png")) == (0, ["fox.png"], 1)
    assert len(seen) == 12
    assert len(set(seen)) > 6
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


@pytest.mark.slow
def test_previews_change_no_pixel_and_no_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (("plain.png", []), ("shown.png", ["--preview"])):
        assert main(["generate", PROMPT, "--model", "demo", "--seed", "1", "-o", name, *flags]) == 0
    assert Path("plain.png").read_bytes() == Path("shown.png").read_bytes()


@pytest.mark.slow
def test_edit_and_decompose_show_previews_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), (40, 90, 200)).save("x.png")
    assert main(["edit", "make it green", "--image", "x.png", "--model", "demo-edit", "--steps", "2", "-o", "y.png",
                 "--preview"]) == 0  # fmt: skip
    assert main(["decompose", "x.png", "--model", "demo-layered", "--steps", "2", "--layers", "2", "--prompt", "x",
                 "--preview"]) == 0  # fmt: skip
    err = capsys.readouterr().err
    assert "preview: y-preview.png" in err
    assert "preview: x-layers-preview.png" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-layers", "x.png", "y.png"]


def test_a_file_of_the_user_s_is_never_touched(tmp_path):
    mine = tmp_path / "fox-preview.png"
    mine.write_bytes(b"mine")

    def interrupted():
        with preview_file(tmp_path / "fox.png") as show:
            show(Image.new("RGB", (8, 8)), 1, 2)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["fox-preview-1.png", "fox-preview.png"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_preview_that_cannot_be_written_is_said_once_and_no_more(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with preview_file(tmp_path / "file" / "fox.png") as show:
        for step in (1, 2):
            show(Image.new("RGB", (8, 8)), step, 2)
    assert [record.message[:11] for record in caplog.records] == ["no preview:"]
