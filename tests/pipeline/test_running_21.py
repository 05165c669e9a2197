"""Qwen-Image-2.1 from a checkpoint, without torch: the reference's numbers, and every way of running it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import goldens
import mlx.core as mx
import numpy as np
import pytest
from checkpoints_21 import GENERATIONS_21, PROMPT_21, TINY_PROCESSOR
from PIL import Image

from qwen_image_mlx import GenerationParameters, Progress, QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.errors import CheckpointError, RequestError
from qwen_image_mlx.models.qwen_image_21 import facts
from qwen_image_mlx.models.qwen_image_21.denoiser import Denoiser, kept_values
from qwen_image_mlx.models.qwen_image_21.transformer import Prefix
from qwen_image_mlx.pipeline.advice import advise
from qwen_image_mlx.pipeline.conditioning import GuidanceEncoding
from qwen_image_mlx.pipeline.image_request import image_request
from qwen_image_mlx.pipeline.inspection import inspect_checkpoint
from qwen_image_mlx.pipeline.qwen_image_21.denoiser import QwenImage21Denoiser
from qwen_image_mlx.pipeline.request import Request
from qwen_image_mlx.runtime.memory import fitting_plan
from qwen_image_mlx.runtime.memory_plan import Work, make_plan, work_of
from qwen_image_mlx.runtime.preview import Preview
from qwen_image_mlx.runtime.session import Session
from qwen_image_mlx.variants import VARIANTS, variant_of

SMALL = {"width": 64, "height": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tiny_21):
    return tiny_21


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return QwenImagePipeline.from_pretrained(checkpoint, dtype="float32")


def with_index(checkpoint, folder, **said):
    """The checkpoint with another model_index.json, its other files linked."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model_index.json").unlink()
    index = json.loads((checkpoint / "model_index.json").read_text()) | said
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", GENERATIONS_21)
def test_latents_of_every_step_and_the_image_are_the_golden_ones(pipeline, name):
    run, made = GENERATIONS_21[name], {}

    def told(progress):
        if progress.stage == "denoise" and progress.step:
            made[f"latents {progress.step - 1}"] = np.array(progress.latents)

    asked = {"negative_prompt": run["negative"], "cfg_scale": run["cfg_scale"], "num_inference_steps": 3, "seed": 7}
    if run["images"]:
        (image,) = pipeline.edit(PROMPT_21, images=run["images"], size=run["size"], progress=told, **asked)
    else:
        width, height = run["size"]
        (image,) = pipeline.generate(PROMPT_21, width=width, height=height, progress=told, **asked)
    goldens.assert_agree(name, made | {"image": np.asarray(image)}, 1e-4)


@pytest.mark.slow
def test_streamed_layers_and_kept_encodings_give_the_same_image(checkpoint, pipeline, tmp_path):
    images = GENERATIONS_21["edit_21"]["images"]
    asked = {"images": images, "size": (64, 64), "num_inference_steps": 2, "cfg_scale": 1.0}
    (expected,) = pipeline.edit("x", **asked)
    streamed = QwenImagePipeline.from_pretrained(
        checkpoint, dtype="float32", streamed=("transformer", "text_encoder", "vision")
    )
    (made,) = streamed.edit("x", **asked)
    assert made.tobytes() == expected.tobytes()
    encoding = pipeline.encode_guidance_prompts("x", images=images)
    encoding.save(tmp_path / "encoding.safetensors")
    again = GuidanceEncoding.load(tmp_path / "encoding.safetensors")
    starts = [reference.start for reference in encoding.references]
    assert [reference.start for reference in again.references] == starts
    assert len(set(starts)) == 2


def test_turbo_has_its_own_noise_levels_and_refuses_other_steps(checkpoint, tmp_path):
    turbo = with_index(checkpoint, tmp_path / "turbo", sample_sigmas=list(facts.TURBO_SIGMAS))
    pipeline = QwenImagePipeline.from_pretrained(turbo, dtype="float32")
    assert pipeline.recommended.num_inference_steps == 8
    steps = []
    pipeline.generate("x", width=32, height=32, progress=lambda p: p.stage == "denoise" and steps.append(p.total))
    assert set(steps) == {8}
    with pytest.raises(RequestError, match="its own 8 noise levels"):
        pipeline.generate("x", width=32, height=32, num_inference_steps=9)


@pytest.mark.parametrize("sigmas", [[], [0.5, 0.6], [1.5], ["1"], 3, [1.0, -0.1], [float("nan")]])
def test_noise_levels_that_are_none_are_refused(sigmas):
    with pytest.raises(CheckpointError, match="sample_sigmas"):
        variant_of({"_class_name": "QwenImage21Pipeline", "sample_sigmas": sigmas}, "here")


def test_both_spellings_of_the_processor(checkpoint, pipeline, tmp_path):
    folder = tmp_path / "nested"
    shutil.copytree(checkpoint, folder)
    (folder / "processor" / "preprocessor_config.json").unlink()
    nested = {"processor_class": "Qwen3VLProcessor", "image_processor": TINY_PROCESSOR}
    (folder / "processor" / "processor_config.json").write_text(json.dumps(nested))
    other = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    images = GENERATIONS_21["edit_21"]["images"][:1]
    one, two = (p.encode_guidance_prompts("x", images=images).positive for p in (pipeline, other))
    assert np.array_equal(np.array(one), np.array(two))


def test_sizes_and_numbers_of_images_are_checked(pipeline, monkeypatch):
    with pytest.raises(RequestError, match="multiple of 32"):
        pipeline.generate("x", width=48, height=32, num_inference_steps=1)
    image = Image.new("RGB", (40, 40))
    with pytest.raises(RequestError, match="at most 10 images"):
        pipeline.edit("x", images=[image] * 11)
    changing = replace(pipeline.components.image_processor, min_pixels=5000)
    monkeypatch.setitem(pipeline.components.__dict__, "image_processor", changing)
    with pytest.raises(RequestError, match="shown at 64x64"):
        pipeline.edit("x", images=[image], reference_pixels=4096)


def test_fewer_reference_pixels_shrink_what_both_are_shown(pipeline):
    image = GENERATIONS_21["edit_21"]["images"][0]
    usual, fewer = (pipeline.encode_guidance_prompts("x", images=[image], reference_pixels=n) for n in (None, 64**2))
    assert (usual.references[0].height, fewer.references[0].height) == (6, 4)
    assert usual.positive.shape[1] - fewer.positive.shape[1] == 9 - 4


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIONS_21)
def test_without_the_prefix_cache_the_latents_are_the_same(pipeline, monkeypatch, name):
    run, made, kept = GENERATIONS_21[name], {True: [], False: []}, []
    leave = Denoiser.leave

    def noted(self, *given):
        found = leave(self, *given)
        kept.append(all(not isinstance(branch.prefix, Prefix) for branch in self._branches))
        return found

    monkeypatch.setattr(Denoiser, "leave", noted)
    asked = {"negative_prompt": run["negative"], "cfg_scale": run["cfg_scale"], "num_inference_steps": 3, "seed": 7}
    asked |= (
        {"images": run["images"], "size": run["size"]}
        if run["images"]
        else dict(zip(("width", "height"), run["size"], strict=True))
    )
    for keep, steps in made.items():
        (image,) = (pipeline.edit if run["images"] else pipeline.generate)(
            PROMPT_21, **asked, prefix_cache=keep,
            progress=lambda p, steps=steps: p.stage == "denoise" and steps.append(np.array(p.latents)),
        )  # fmt: skip
        assert json.loads(image.info["qwen_image_mlx"]).get("no_prefix_cache", False) == (not keep)
    assert kept == [True] * 3 + [False] * 3
    assert max(np.abs(a - b).max() for a, b in zip(made[True], made[False], strict=True)) <= 1e-6


def test_a_plan_without_the_prefix_cache_takes_less(pipeline):
    work = Work(64, 64, shown=((64, 64),) * 3, encoded=64 * 64, guided=True, text_tokens=20)
    with_it, without = (make_plan(pipeline.components, replace(work, keeps_prefix=keep)) for keep in (True, False))
    kept = kept_values(pipeline.components.config("transformer"), 20 + 3 * 16, 2)
    assert with_it.stages[2].resident - without.stages[2].resident == 4 * kept


def test_a_prefix_that_does_not_fit_is_told_the_way_out(checkpoint, monkeypatch):
    monkeypatch.setattr(QwenImage21Denoiser, "kept_values", lambda config, steps, tokens, branches: 10**6 * tokens)
    session = Session.open({"model": str(checkpoint), "memory": "resident"}, "")
    image = GENERATIONS_21["edit_21"]["images"][0]
    request = session.request({"prompt": "x", "seed": 1}, (32, 32), [image] * 8, task="edit")
    work = work_of(request, session.pipeline)
    kept, anew = (
        fitting_plan(session.pipeline.components, replace(work, keeps_prefix=keep), session.memory).peak
        for keep in (True, False)
    )
    session.memory = replace(session.memory, budget=(kept + anew) // 2)
    with pytest.raises(RequestError) as refused, session.plan(request):
        pass
    assert refused.value.cause == "prefix cache"
    session.memory = replace(session.memory, budget=anew // 2)
    with pytest.raises(RequestError) as refused, session.plan(request):
        pass
    assert refused.value.cause == "budget"


def test_doubtful_requests_are_warned_of(pipeline, checkpoint, tmp_path, caplog):
    turbo = QwenImagePipeline.from_pretrained(with_index(checkpoint, tmp_path / "t", sample_sigmas=facts.TURBO_SIGMAS))
    image = GENERATIONS_21["edit_21"]["images"][0]

    def said(variant, size, images=()):
        caplog.clear()
        parameters = GenerationParameters(width=size[0], height=size[1], num_inference_steps=8)
        advise([Request(prompt="x", negative_prompt=None, parameters=parameters, seeds=(0,), images=images)], variant)
        return caplog.text

    assert "pixel grid" in said(turbo.variant, (960, 960))
    assert not said(turbo.variant, (1248, 832)), "about 1024x1024, as sizes are rounded"
    assert not said(pipeline.variant, (512, 512))
    assert "992x992 and 1056x1056" in said(pipeline.variant, (1024, 1024), (image,))
    assert not said(pipeline.variant, (1024, 1024))
    assert not said(pipeline.variant, (1024, 992), (image,))


def test_transparent_words_the_prompt(pipeline):
    (image,) = pipeline.generate("a fox", transparent=True, **SMALL)
    assert json.loads(image.info["qwen_image_mlx"])["prompt"] == facts.transparent_prompt("a fox")
    first = VARIANTS["QwenImagePipeline"]
    with pytest.raises(RequestError, match="no transparent images"):
        image_request(first, "a fox", None, (), None, {}, seed=0, num_images=1, rng="torch", strength=1.0,
                      transparent=True)  # fmt: skip


def test_previews_map_its_latents_to_colours(pipeline):
    """A token is a place of 16x16 pixels: its 64 values times the map, and what is added."""
    found = []
    parameters = GenerationParameters(**SMALL)
    request = Request(prompt="x", negative_prompt=None, parameters=parameters, seeds=(0,))
    preview = Preview(lambda image, *_: found.append(image), None, pipeline, request)
    clean = np.random.default_rng(0).standard_normal((1, 8, 64)).astype(np.float32)
    preview(Progress("denoise", 1, 2, sigma=0.5, latents=mx.array(clean), denoised=mx.array(clean)))
    *factors, bias = facts.PREVIEW
    expected = np.clip((clean[0] @ np.array(factors) + bias + 1) / 2, 0, 1).reshape(2, 4, 3)
    (image,) = found
    assert image.size == (64, 32)
    small = np.asarray(image.resize((4, 2), Image.Resampling.BOX)) / 255
    assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.95


@pytest.mark.slow
def test_opaque_images_are_rgb(pipeline, monkeypatch):
    (image,) = pipeline.generate("x", **SMALL)
    assert image.mode == "RGBA"
    decode = pipeline.decode_frames

    def opaque_but(pixel, *given, **more):
        for frame in decode(*given, **more):
            frame[..., 3] = 1.0
            if pixel:
                frame[(..., *pixel, 3)] = 0.5
            yield frame

    for pixel, mode in ((None, "RGB"), ((3, 5), "RGBA")):
        monkeypatch.setattr(pipeline, "decode_frames", partial(opaque_but, pixel))
        (image,) = pipeline.generate("x", **SMALL)
        assert image.mode == mode


@pytest.mark.slow
def test_a_mask_keeps_what_it_keeps(pipeline):
    source, mask = GENERATIONS_21["edit_21"]["images"][1], goldens.mask(200, 120)
    (image,) = pipeline.generate("x", image=source, mask=mask, num_inference_steps=2, strength=1.0)
    kept = np.asarray(mask) < 128
    assert np.array_equal(np.asarray(image.convert("RGBA"))[kept], np.asarray(source)[kept])


@pytest.mark.slow
def test_the_command_line_generates_edits_packs_and_plans(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for n, picture in enumerate(GENERATIONS_21["edit_21"]["images"]):
        picture.save(f"{n}.png")
    model = ["--model", str(checkpoint), "--steps", "2", "--seed", "3", "--dtype", "float32"]
    sized = ["--width", "64", "--height", "32"]
    assert main(["generate", "a fox", "--transparent", "-o", "a.png", *sized, *model]) == 0
    made = Image.open("a.png")
    assert (made.size, made.mode) == ((64, 32), "RGBA")
    said = json.loads(made.info["qwen_image_mlx"])
    assert said["prompt"] == facts.transparent_prompt("a fox")
    edit = ["edit", "x", "--image", "0.png", "--image", "1.png", "--size", "64x64"]
    assert main([*edit, "-o", "b.png", *model]) == 0
    assert main([*edit, "-o", "c.png", "--quantize", "8", *model]) == 0
    assert main(["quantize", str(checkpoint), "pack", "--bits", "8"]) == 0
    assert main([*edit, "-o", "d.png", "--model", "pack", *model[2:]]) == 0
    b, c, d = (np.asarray(Image.open(f"{name}.png").convert("RGBA"), int) for name in "bcd")
    assert b.shape == c.shape == d.shape
    assert not np.array_equal(b, d)
    licence, card = f"{facts.LICENCE} ({facts.LICENCE_LINK})", (tmp_path / "pack" / "README.md").read_text()
    assert f"license_name: qwen-research\nlicense_link: {facts.LICENCE_LINK}\n" in card.split("---")[1]
    assert licence in card
    assert main(["info", "pack"]) == 0
    assert main(["plan", "pack", "--references", "10"]) == 0
    assert capsys.readouterr().out.count(licence) == 2


def test_what_it_cannot_do_is_said(checkpoint, pipeline, tmp_path):
    with pytest.raises(RequestError, match="not a model to decompose"):
        pipeline.decompose(Image.new("RGBA", (32, 32)))
    with pytest.raises(CheckpointError, match=r"cannot write captions: it lacks the files .*lm_head\.weight"):
        pipeline.caption_image(Image.new("RGB", (32, 32)))
    with pytest.raises(RequestError, match="zero_cond_t"):
        QwenImagePipeline.from_pretrained(checkpoint, zero_cond_t=True).prepare()
    assert inspect_checkpoint(checkpoint).task == "generate, edit"


def test_the_official_sizes_are_its_own():
    variant = VARIANTS["QwenImage21Pipeline"]
    assert variant.size_of("16:9") == (2752, 1536)
    assert all(side % 32 == 0 for aspect in variant.sizes for side in variant.size_of(aspect))
