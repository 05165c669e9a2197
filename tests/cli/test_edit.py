"""The edit command, and image to image with generate: sizes, masks that keep every bit, the cache, bad images."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, stages
from PIL import Image

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline.conductor import encode_request

QUICK = ["--steps", "2", "--dtype", "float32", "--seed", "3", "--cfg-scale", "1"]


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory):
    from checkpoints import write_edit

    return write_edit(tmp_path_factory.mktemp("edit_cli") / "model", "edit_plus", transformer={"zero_cond_t": True})


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """The real areas are a megapixel; nothing but time depends on them."""
    from qwen_image_mlx import variants

    for name, row in variants.VARIANTS.items():
        small = replace(row, encoder_area=row.encoder_area and 96**2, reference_area=64**2, target_area=128**2)
        monkeypatch.setitem(variants.VARIANTS, name, small)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (90, 150, 3), np.uint8))
    colours.save("photo.png")
    colours.rotate(90, expand=True).save("tall.png")
    mask = np.zeros((90, 150), np.uint8)
    mask[30:60, 40:100] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


@pytest.fixture
def run(here, edit_model, tiny, capsys):
    def call(command, *arguments):
        given = [command, *map(str, arguments)]
        if "--model" not in given:
            given += ["--model", str(edit_model if command == "edit" else tiny)]
        code = main(given)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def opened(result) -> Image.Image:
    code, (path,), err = result
    assert code == 0, err
    return Image.open(path)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "size"), [
    ([], (160, 96)),  # about the model's area at the image's aspect, in steps of 32
    (["--size", "source"], (150, 90)),
    (["--size", "80x48"], (80, 48)),
    (["--width", "48", "--height", "80"], (48, 80)),
    (["--image", "tall.png"], (96, 160)),  # the last image gives the size
])  # fmt: skip
def test_sizes_of_an_edit(run, flags, size):
    assert opened(run("edit", "make it blue", "--image", "photo.png", *QUICK, *flags)).size == size


@pytest.mark.slow
@pytest.mark.parametrize("command", ["edit", "generate"])
@pytest.mark.parametrize("extra", [[], ["--mask-padding", "8"], ["--strength", "1"]])
def test_every_pixel_outside_the_mask_comes_back(run, command, extra):
    result = opened(run(command, "a hat", "--image", "photo.png", "--mask", "mask.png", *QUICK, *extra))
    source = np.asarray(Image.open("photo.png"))
    kept = np.asarray(Image.open("mask.png")) == 0
    result = np.asarray(result)
    assert result.shape == source.shape
    np.testing.assert_array_equal(result[kept], source[kept])
    assert np.abs(result[~kept].astype(int) - source[~kept]).mean() > 5


@pytest.mark.slow
@pytest.mark.parametrize("command", ["edit", "generate"])
def test_no_composite_gives_the_model_s_own_image(run, command):
    result = opened(run(command, "a hat", "--image", "photo.png", "--mask", "mask.png", "--no-composite", *QUICK))
    assert result.size == (160, 96)


@pytest.mark.reference
def test_generate_paints_over_an_image(run, reference):
    from reference_edit import TEXT_CLASSES, run_edit_reference

    result = opened(run("generate", "a hat", "--image", "photo.png", "--strength", "0.7", *QUICK, "--steps", 5,
                        "--width", 96, "--height", 64))  # fmt: skip
    pipe = TEXT_CLASSES["img2img"](**reference.components)
    _, images = run_edit_reference(
        pipe, prompt="a hat", image=Image.open("photo.png"), strength=0.7, width=96, height=64, steps=5, cfg_scale=1.0,
        seed=3,
    )  # fmt: skip
    assert np.abs(np.asarray(result).astype(int) - np.asarray(images[0]).astype(int)).max() <= 1


@pytest.mark.slow
def test_an_edit_is_generated_again_from_its_metadata(run):
    opened(
        run("edit", "a hat", "--image", "photo.png", "--image", "tall.png", "--size", "source", "-o", "a.png", *QUICK)
    )
    again = opened(run("edit", "--from-image", "a.png", "-o", "b.png"))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    metadata = json.loads(again.text["qwen_image_mlx"])
    assert (metadata["images"], metadata["size"]) == (["photo.png", "tall.png"], "source")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flags"), [
    ("edit", ["--size", "80x48"]),
    ("edit", ["--width", "48", "--height", "80"]),
    ("edit", ["--mask", "mask.png", "--strength", "0.8", "--mask-padding", "8"]),
    ("generate", ["--width", "96", "--height", "64", "--strength", "0.8"]),
    ("generate", ["--mask", "mask.png", "--no-composite"]),
])  # fmt: skip
def test_every_way_of_generateing_over_is_generated_again(run, command, flags):
    opened(run(command, "a hat", "--image", "photo.png", "-o", "a.png", *QUICK, *flags))
    opened(run(command, "--from-image", "a.png", "-o", "b.png"))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.slow
def test_a_folder_that_has_moved_is_generated_from_again(run, here, edit_model, monkeypatch):
    work = here / "work"
    work.mkdir()
    (work / "model").symlink_to(edit_model)
    for name in ("photo.png", "mask.png"):
        (here / name).rename(work / name)
    monkeypatch.chdir(work)
    first = ["--image", "photo.png", "--mask", "mask.png", "--model", "model", *QUICK, "-o", "a.png"]
    opened(run("edit", "a hat", *first))
    monkeypatch.chdir(here)
    code = main(["edit", "--from-image", "work/a.png", "-o", "b.png"])
    assert code == 0
    pixels = [Image.open(path).tobytes() for path in ("work/a.png", "b.png")]
    assert pixels[0] == pixels[1]


@pytest.mark.slow
def test_a_seed_nobody_chose_is_said(run):
    chosen = [*QUICK[:4], "--cfg-scale", "1", "--width", "64", "--height", "64"]
    code, (path,), err = run("generate", "a hat", *chosen)
    assert code == 0
    seed = json.loads(Image.open(path).text["qwen_image_mlx"])["seed"]
    assert f"seed {seed}" in err
    assert "seed" not in run("generate", "a hat", *chosen, "--seed", "3")[2]


def test_several_seeds_are_numbered_without_a_warning(run):
    code, paths, err = run("generate", "a hat", "--width", "64", "--height", "64", *QUICK, "--seed", "3", "4")
    assert (code, paths) == (0, ["qwen-image.png", "qwen-image-1.png"])
    assert "exists" not in err


@pytest.mark.slow
def test_painting_over_says_that_it_stretches(run):
    stretched = run("generate", "a hat", "--image", "photo.png", "--width", "64", "--height", "96", *QUICK)
    assert "stretched" in stretched[2]
    assert "stretched" not in run("generate", "a hat", "--image", "photo.png", *QUICK)[2]


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_photograph_is_applied(run, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open("photo.png").save("turned.jpg", exif=exif)
    turned = orientation >= 5
    result = opened(run("edit", "a hat", "--image", "turned.jpg", "--size", "source", *QUICK, "--steps", 1))
    assert result.size == ((90, 150) if turned else (150, 90))


@pytest.mark.slow
def test_transparency_is_laid_on_white_or_kept(run):
    image = Image.open("photo.png").convert("RGBA")
    alpha = Image.open("mask.png")
    image.putalpha(alpha)
    image.save("clear.png")
    flat = run("edit", "a hat", "--image", "clear.png", "--size", "source", *QUICK)
    assert "laid on white" in flat[2]
    assert opened(flat).mode == "RGB"
    masked = opened(run("edit", "a hat", "--image", "clear.png", "--mask", "mask.png", "--keep-alpha", *QUICK))
    outside = np.asarray(alpha) == 0
    np.testing.assert_array_equal(np.asarray(masked)[outside], np.asarray(image)[outside])
    kept = opened(run("edit", "a hat", "--image", "clear.png", "--size", "source", "--keep-alpha", *QUICK))
    assert kept.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(kept.getchannel("A")), np.asarray(alpha))


@pytest.mark.slow
def test_zero_cond_t_can_be_overridden(run):
    by_flag = {
        flag: np.asarray(opened(run("edit", "a hat", "--image", "photo.png", *flag, *QUICK)))
        for flag in ((), ("--zero-cond-t", "on"), ("--zero-cond-t", "off"))
    }
    np.testing.assert_array_equal(by_flag[()], by_flag["--zero-cond-t", "on"])
    assert not np.array_equal(by_flag[()], by_flag["--zero-cond-t", "off"])


@pytest.mark.slow
def test_a_cached_encoding_loads_no_encoder(run):
    given = ["a hat", "--image", "photo.png", "--cache", "--json", *QUICK]
    first = stages(run("edit", *given, "-o", "a.png"))
    second = stages(run("edit", *given, "-o", "b.png"))
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    encoders = {f"load {component}" for component in ("text_encoder", "vision", "tokenizer", "vae_encoder")}
    assert encoders <= first
    assert not encoders & second
    for change in (["--image", "tall.png"], ["--reference-pixels", "4096"], ["--cfg-scale", "2"]):
        assert "load text_encoder" in stages(run("edit", *given, *change)), change


@pytest.mark.slow
def test_a_cache_knows_a_checkpoint_that_changed(run, here, edit_model):
    shutil.copytree(edit_model, "model")
    given = ["a hat", "--image", "photo.png", "--cache", "--model", "model", "--json", *QUICK]
    run("edit", *given)
    assert "load text_encoder" not in stages(run("edit", *given))
    config = Path("model/processor/preprocessor_config.json")
    config.write_text(config.read_text() + " ")
    assert "load text_encoder" in stages(run("edit", *given))


@pytest.mark.slow
def test_a_cache_knows_how_the_encoder_was_packed(run):
    given = ["a hat", "--image", "photo.png", "--cache", "--json", *QUICK]
    run("edit", *given)
    assert "load text_encoder" in stages(run("edit", *given, "--quantize", "text_encoder=8/32"))
    assert "load text_encoder" not in stages(run("edit", *given, "--quantize", "transformer=8/32"))


@pytest.mark.slow
def test_a_damaged_cache_entry_is_encoded_again(run, here):
    run("generate", "a hat", "--width", 64, "--height", 64, "--cache", *QUICK)
    (entry,) = here.glob("cache/qwen-image-mlx/encodings/*.safetensors")
    entry.write_bytes(b"broken")
    code, _, err = run("generate", "a hat", "--width", 64, "--height", 64, "--cache", *QUICK)
    assert code == 0
    assert "is encoded again" in err
    assert "comes from the cache" not in err


def test_the_cache_is_bounded(tmp_path, edit_model):
    from qwen_image_mlx import GenerationParameters, QwenImagePipeline
    from qwen_image_mlx.pipeline.request import Request
    from qwen_image_mlx.runtime.cache import EncodingCache

    pipeline = QwenImagePipeline.from_pretrained(edit_model, dtype="float32")
    photo = Image.new("RGB", (64, 64), "red")
    parameters = GenerationParameters(width=64, height=64)
    request = Request(prompt="0", negative_prompt=None, parameters=parameters, seeds=(1,), images=(photo,))
    encoding = encode_request(pipeline, request)
    encoding.save(tmp_path / "probe.safetensors")
    one = (tmp_path / "probe.safetensors").stat().st_size
    cache = EncodingCache(tmp_path / "cache", max_bytes=int(3.5 * one))
    for n in range(6):
        cache.put(pipeline, replace(request, prompt=str(n)), encoding)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert cache.get(pipeline, replace(request, prompt="5")) is not None
    assert cache.get(pipeline, replace(request, prompt="0")) is None


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A small file of very many pixels; made once, as that takes a second."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    return path


@pytest.fixture
def odd_files(here, bomb):
    Path("text.png").write_text("not an image")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:2000])
    Image.new("L", (150, 90), 0).save("black.png")
    Image.new("L", (150, 90), 255).save("white.png")
    Image.new("L", (75, 45), 128).save("small.png")
    Image.new("RGB", (3000, 10)).save("long.png")
    Path("bomb.png").symlink_to(bomb)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "says"), [
    (["--image", "none.png"], "none.png"),
    (["--image", "text.png"], "text.png"),
    (["--image", "cut.png"], "cut.png"),
    (["--image", "bomb.png"], "bomb.png"),
    (["--image", "long.png"], "3000x10"),
    (["--image", "."], "."),
    (["--image", "photo.png", "--mask", "none.png"], "none.png"),
    (["--image", "photo.png", "--mask", "small.png"], "75x45"),
    (["--image", "photo.png", "--mask", "black.png"], "black"),
    (["--image", "photo.png", "--mask", "white.png"], "white"),
    (["--image", "photo.png", "--mask-padding", "4"], "needs --mask"),
    (["--image", "photo.png", "--no-composite"], "needs --mask"),
    (["--image", "photo.png", "--mask", "mask.png", "--mask-padding", "-30"], "padding"),
    (["--image", "photo.png", "--output", 300 * "a" + ".png"], "too long"),
    (["--image", "photo.png", "--output", "~nobody-of-this-name/x.png"], "leads nowhere"),
    (["--image", "photo.png", "--mask", "mask.png", "--strength", "0"], "strength"),
    (["--image", "photo.png", "--size", "huge"], "1mp"),
    (["--image", "photo.png", "--size", "100x100"], "96 and 112"),
    (["--image", "photo.png", "--size", "source", "--width", "64", "--height", "64"], "one size only"),
    (["--image", "photo.png", "--reference-pixels", "3"], "reference_pixels"),
    (["--image", "photo.png", "--strength", "0.5"], "--mask"),
    (["--image", "photo.png", "--zero-cond-t", "maybe"], "zero-cond-t"),
    ([], "--image"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_images(run, odd_files, here, flags, says):
    before = sorted(here.iterdir())
    assert says in error_line(run("edit", "a hat", *flags, *QUICK))
    assert sorted(here.iterdir()) == before


@pytest.mark.slow
def test_one_pixel_and_animated_images_are_edited(run):
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert opened(run("edit", "a hat", "--image", "dot.png", *QUICK)).size == (128, 128)
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    result = run("edit", "a hat", "--image", "moving.gif", *QUICK)
    assert "first frame" in result[2]
    assert opened(result).size == (128, 128)


def test_models_and_commands_must_match(run, tiny, edit_model):
    assert "use generate" in error_line(run("edit", "a hat", "--image", "photo.png", "--model", tiny, *QUICK))
    assert "use edit" in error_line(run("generate", "a hat", "--model", edit_model, *QUICK))


@pytest.mark.slow
def test_many_images_are_said_to_be_costly(run):
    given = [flag for _ in range(3) for flag in ("--image", "photo.png")]
    assert "3 reference images are given" in run("edit", "a hat", *given, *QUICK, "--steps", "1")[2]
    assert "reference images" not in run("edit", "a hat", *given[:4], *QUICK, "--steps", "1")[2]


def test_painting_over_takes_one_image(run):
    given = ["--image", "photo.png", "--image", "tall.png"]
    assert "one image" in error_line(run("generate", "a hat", *given, *QUICK))


def test_a_model_that_is_not_there(run):
    assert "no directory 'tiny-edit' exists" in error_line(
        run("edit", "a hat", "--image", "photo.png", "--model", "tiny-edit", *QUICK)
    )


def test_painting_over_needs_an_image(run):
    for flags in (["--mask", "mask.png"], ["--strength", "0.5"], ["--size", "source"]):
        assert "--image" in error_line(run("generate", "a hat", *flags, *QUICK))


def test_a_prompt_with_a_placeholder_of_its_own(run):
    assert "<|image_pad|>" in error_line(run("edit", "put <|image_pad|> here", "--image", "photo.png", *QUICK))


def test_a_prompt_that_is_too_long_is_refused_before_it_is_encoded(run):
    given = ["x " * 9000, "--image", "photo.png", *QUICK]
    assert "reach past" in error_line(run("edit", *given))
    done = stages(run("edit", *given, "--json"))
    assert done == {"load tokenizer"}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_names_that_are_no_text_are_refused_before_any_work(run):
    shutil.copy("photo.png", b"bad\xff.png")
    given = ["a hat", "--image", os.fsdecode(b"bad\xff.png"), *QUICK]
    assert "not valid text" in error_line(run("edit", *given))
    assert stages(run("edit", *given, "--json")) == set()


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"images": [1]}, {"images": [None]}, {"image_index": -1}, {"image_index": 10**30}, {"sigmas": ["a"]},
    {"sigmas": [[1]]},
    {"mask_padding": -30}, {"zero_cond_t": "maybe"}, {"seed": "3"}, {"size": "big"}, {"quantize": "7"}, {"loras": [3]},
], ids=str)  # fmt: skip
def test_damaged_metadata_is_refused(run, change):
    from PIL.PngImagePlugin import PngInfo

    path = opened(run("edit", "a hat", "--image", "photo.png", "--mask", "mask.png", *QUICK)).filename
    metadata = {**json.loads(Image.open(path).text["qwen_image_mlx"]), **change}
    info = PngInfo()
    info.add_itxt("qwen_image_mlx", json.dumps(metadata))
    Image.open(path).save("odd.png", pnginfo=info)
    error_line(run("edit", "--from-image", "odd.png", "-o", "again.png"))
    assert not Path("again.png").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": 1' + "0" * 5000 + "}", "nothing", "[]"])
def test_metadata_that_is_no_json_is_refused(run, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("qwen_image_mlx", text)
    Image.open("photo.png").save("odd.png", pnginfo=info)
    assert "carries no parameters" in error_line(run("edit", "--from-image", "odd.png"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--mask", "mask.png"], ["--size", "source"]])
def test_a_profile_of_srgb_changes_nothing(run, flags):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open("photo.png").save("profiled.png", icc_profile=profile)
    result = opened(run("edit", "a hat", "--image", "profiled.png", *flags, *QUICK, "--steps", "1"))
    plain = opened(run("edit", "a hat", "--image", "photo.png", *flags, *QUICK, "--steps", "1"))
    assert plain.tobytes() == result.tobytes()
    assert "icc_profile" not in plain.info
    assert "icc_profile" not in result.info


@pytest.mark.slow
def test_the_model_sees_what_a_profile_means(run):
    from qwen_image_mlx.images.colour import _matrix_profile
    from qwen_image_mlx.images.sources import open_image

    photo = Image.open("photo.png").convert("RGB")
    photo.save("wide.png", icc_profile=_matrix_profile(1 / 1.8, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)))
    open_image("wide.png").save("converted.png")
    photo.save("plain.png")
    edit = "edit", "a hat", "--mask", "mask.png", *QUICK, "--steps", "1"
    wide, converted, ignored, plain = (
        opened(run(*edit, "--image", *words))
        for words in (["wide.png"], ["converted.png"], ["wide.png", "--ignore-profile"], ["plain.png"])
    )
    assert wide.tobytes() == converted.tobytes()
    assert ignored.tobytes() == plain.tobytes() != wide.tobytes()
    assert not any("icc_profile" in image.info for image in (wide, converted, ignored, plain))
    assert opened(run("edit", "--from-image", "qwen-image-2.png")).tobytes() == plain.tobytes()
