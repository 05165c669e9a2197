"""Encoded examples are what the pipeline itself makes of them; every step draws its own."""

from __future__ import annotations

import json
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_edit, write_layered
from PIL import Image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.models.qwen_image.rope import Segment
from qwen_image_mlx.sampling.latents import pack_latents
from qwen_image_mlx.training.dataset import Dataset, digest_of, encode_examples
from qwen_image_mlx.training.examples import Example
from qwen_image_mlx.weights.safetensors_files import load_tensors, save_tensors

SIZES = {"wide": (150, 60), "square": (100, 100), "tall": (70, 140)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in SIZES.items():
        coarse = rng.integers(0, 256, (5, 5, 4), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        Image.fromarray(coarse[..., :3]).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}-rgb.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("models")
    return {"t2i": tiny, "edit": write_edit(folder / "edit", "edit_plus"), "layered": write_layered(folder / "layered")}


def open_model(models, task):
    return QwenImagePipeline.from_pretrained(models[task], dtype="float32")


def encode(pipeline, examples, task, folder, resolution=64, with_dropped=False, **options):
    entries = encode_examples(pipeline, examples, task, resolution, with_dropped, folder, **options)
    return Dataset(entries, seed=0, batch_size=4)


@pytest.mark.slow
def test_text_to_image_crops_to_buckets_and_keeps_the_pipeline_s_states(models, images, tmp_path):
    pipeline = open_model(models, "t2i")
    examples = [Example(f"a {name} fox", images / f"{name}-rgb.png") for name in SIZES]
    dataset = encode(pipeline, examples, "t2i", tmp_path)
    grids = {name: entry.segments for name, entry in zip(SIZES, dataset._entries, strict=True)}
    assert grids == {"wide": (Segment(0, 3, 6),), "square": (Segment(0, 4, 4),), "tall": (Segment(0, 6, 3),)}
    (batch,) = [b for b in dataset.batches(0) if b.segments == grids["wide"]]
    assert (batch.latents.shape, batch.references) == ((1, 18, 64), None)
    own = pipeline.encode_guidance_prompts("a wide fox").positive
    assert mx.array_equal(batch.text, own)
    image = Image.open(images / "wide-rgb.png")
    cropped = image.resize((96, 48), Image.Resampling.LANCZOS, box=(15, 0, 135, 60))
    initial = pipeline.encode_initial_image(cropped, (96, 48))
    config = pipeline.components.config("vae")
    expected = (initial.mean - mx.array(config.latents_mean)) / mx.array(config.latents_std)
    assert mx.allclose(batch.latents, pack_latents(expected), atol=1e-5)


@pytest.mark.slow
def test_edits_are_encoded_as_the_pipeline_encodes_its_requests(models, images, tmp_path):
    pipeline = open_model(models, "edit")
    sources = (images / "square-rgb.png", images / "wide-rgb.png")
    example = Example("join them", images / "square-rgb.png", sources)
    (batch,) = encode(pipeline, [example], "edit", tmp_path, with_dropped=True).batches(0)[:1]
    own = pipeline.encode_guidance_prompts("join them", images=sources, reference_pixels=64**2)
    assert mx.array_equal(batch.text[:1], own.positive)
    assert mx.array_equal(batch.references[:1], mx.concatenate([r.latents for r in own.references], axis=1))
    assert batch.segments == (Segment(0, 4, 4), Segment(1, 4, 4), Segment(2, 2, 6))
    assert mx.array_equal(batch.latents[:1], own.references[0].latents), "source and target are one image here"


@pytest.mark.slow
def test_layers_follow_the_whole_image_and_it_is_shown_at_frame_minus_one(models, images, tmp_path):
    pipeline = open_model(models, "layered")
    whole, layers = images / "wide.png", (images / "wide-rgb.png", images / "wide.png")
    (batch,) = encode(pipeline, [Example("a fox", whole, layers=layers)], "layered", tmp_path).batches(0)[:1]
    grid = (1 * 2, 3 * 2)
    assert batch.segments == (*(Segment(n, *grid) for n in range(3)), Segment(-1, *grid))
    own = pipeline.encode_guidance_prompts("a fox", images=[whole], reference_pixels=64**2)
    assert mx.array_equal(batch.text[:1], own.positive)
    frames = mx.split(batch.latents[:1], 3, axis=1)
    for frame in (frames[0], frames[2], batch.references[:1]):
        assert mx.array_equal(frame, own.references[0].latents)
    assert not mx.array_equal(frames[1], frames[0])


def test_what_is_encoded_once_is_kept_and_no_encoder_is_loaded(models, images, tmp_path, monkeypatch):
    examples = [Example("a fox", images / "square.png"), Example("a hare", images / "tall.png")]
    pipeline = open_model(models, "t2i")
    first = encode(pipeline, examples, "t2i", tmp_path).batches(0)
    assert not pipeline.is_text_encoder_loaded
    assert not pipeline.is_vae_loaded
    calls = []
    real = QwenImagePipeline.encode_guidance_prompts
    monkeypatch.setattr(
        QwenImagePipeline, "encode_guidance_prompts", lambda self, prompt, *a, **k: calls.append(prompt) or real(
            self, prompt, *a, **k)
    )  # fmt: skip
    again = open_model(models, "t2i")
    second = encode(again, examples, "t2i", tmp_path).batches(0)
    assert (calls, again.is_vae_loaded) == ([], False)
    assert all(mx.array_equal(a.text, b.text) for a, b in zip(first, second, strict=True))
    changed = [Example("a fox", images / "square.png"), Example("another hare", images / "tall.png")]
    encode(again, changed, "t2i", tmp_path)
    assert calls == ["another hare"]
    damaged = next(iter(sorted(tmp_path.iterdir())))
    damaged.write_bytes(damaged.read_bytes()[:100])
    encode(again, examples, "t2i", tmp_path)
    encode(again, examples, "t2i", tmp_path, resolution=80)
    assert len(calls) in (3, 4), "the damaged one, unless it was the changed one's, and two of another resolution"


@pytest.mark.parametrize("harm", ["latents", "text", "segments", "deep", "cut"])
def test_a_kept_entry_of_another_shape_is_made_anew(models, images, tmp_path, harm):
    examples = [Example("a fox", images / "square.png")]
    (whole,) = encode(open_model(models, "t2i"), examples, "t2i", tmp_path).batches(0)
    (path,) = tmp_path.glob("*.safetensors")
    arrays, metadata = load_tensors(path)
    if harm in arrays:
        arrays[harm] = arrays[harm][..., :-1]
    elif harm == "cut":
        arrays["latents"] = arrays["latents"][0]
    else:
        metadata["segments"] = json.dumps([[0, 1, 1]]) if harm == "segments" else "[" * 100_000
    save_tensors(path, arrays, metadata)
    (batch,) = encode(open_model(models, "t2i"), examples, "t2i", tmp_path).batches(0)
    assert mx.array_equal(batch.latents, whole.latents)
    assert mx.array_equal(batch.text, whole.text)


def test_dropped_captions_are_those_of_an_empty_prompt(models, images, tmp_path):
    pipeline = open_model(models, "t2i")
    entries = encode_examples(pipeline, [Example("a fox", images / "square.png")], "t2i", 64, True, tmp_path)
    empty = pipeline.encode_guidance_prompts(" ").positive
    always, never = (Dataset(entries, 0, 1, caption_dropout=share).batches(0)[0].text for share in (1.0, 0.0))
    assert mx.array_equal(always, empty)
    assert never.shape != empty.shape
    half = Dataset(entries, 0, 1, caption_dropout=0.5)
    share = np.mean([half.batches(step)[0].text.shape == empty.shape for step in range(200)])
    assert 0.4 < share < 0.6


@pytest.mark.slow
def test_every_epoch_has_each_example_once_in_an_order_of_its_own(models, images, tmp_path):
    examples = [Example(f"fox {n}", images / "square.png") for n in range(10)]
    entries = encode_examples(open_model(models, "t2i"), examples, "t2i", 64, False, tmp_path)
    names = {entry.path: n for n, entry in enumerate(entries)}

    def order(dataset, steps):
        return [names[entry.path] for step in steps for group in dataset._groups(step) for entry, _ in group]

    one, other = Dataset(entries, 1, 2), Dataset(entries, 2, 2)
    epochs = [order(one, range(5 * n, 5 * n + 5)) for n in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, order(other, range(5)))}) == 4
    assert order(one, [7]) == epochs[1][4:6], "whatever was drawn before"
    straddling = Dataset(entries, 1, 4)
    assert Counter(order(straddling, range(5))) == dict.fromkeys(range(10), 2)


def test_a_step_s_samples_are_batched_by_shape(models, images, tmp_path):
    names = ["square", "square", "square", "tall"]
    examples = [Example(f"fox {n}", images / f"{name}.png") for n, name in enumerate(names)]
    entries = encode_examples(open_model(models, "t2i"), examples, "t2i", 64, False, tmp_path)
    dataset = Dataset(entries, 0, batch_size=2, accumulate=2)
    batches = dataset.batches(0)
    assert sorted(map(len, batches)) == [1, 1, 2]
    assert dataset.batch_sizes(0) == [len(batch) for batch in batches]
    assert len({batch.segments for batch in batches}) == 2


def test_images_that_cannot_be_trained_on_are_named(models, images, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((images / "square.png").read_bytes()[:200])
    pipeline = open_model(models, "t2i")

    def fails(examples, task="t2i", resolution=64):
        with pytest.raises(RequestError) as raised:
            encode_examples(pipeline, examples, task, resolution, False, tmp_path / "cache")
        assert not pipeline.is_text_encoder_loaded
        return str(raised.value)

    assert "damaged.png cannot be read as an image" in fails([Example("x", damaged)])
    Image.new("RGB", (112, 112)).save(tmp_path / "large.png")
    files = [tmp_path / "large.png", *(images / f"{name}.png" for name in ("wide", "tall"))]
    small = fails([Example("x", file) for file in files], resolution=112)
    assert small.startswith("2 of 3 images are smaller than the 112x112 pixels that the resolution 112 trains on: ")
    assert "wide.png (150x60), tall.png (70x140)" in small
    odd = Example("x", images / "square.png", layers=(images / "tall.png",))
    assert "1 layers differ in size from their image" in fails([odd], "layered")


def test_a_digest_stands_for_images_and_captions(images, tmp_path):
    fox = Example("a fox", images / "square.png")
    copy = tmp_path / "copy.png"
    copy.write_bytes(fox.image.read_bytes())
    assert digest_of([fox]) == digest_of([Example("a fox", copy)])
    others = [[Example("a hare", fox.image)], [Example("a fox", images / "tall.png")], [fox, fox],
              [Example("a fox", fox.image, sources=(fox.image,))]]  # fmt: skip
    assert len({digest_of(examples) for examples in ([fox], *others)}) == 5
