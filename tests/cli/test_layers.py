"""decompose, compose, caption and edits of one layer, from flags to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import error_line
from PIL import Image

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.geometry import size_of_area

QUICK = ["--steps", "2", "--dtype", "float32", "--cfg-scale", "1"]
APART = [*QUICK, "--resolution", "96", "--seed", "3", "--prompt", "a fox"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from checkpoints import write_edit, write_layered

    folder = tmp_path_factory.mktemp("layers_cli")
    return {
        "decompose": write_layered(folder / "layered"),
        "edit": write_edit(folder / "edit", "edit_plus"),
    }


@pytest.fixture(autouse=True)
def small_areas(monkeypatch):
    """The real areas are of 640 pixels squared and more; nothing but time depends on them."""
    from qwen_image_mlx import variants
    from qwen_image_mlx.pipeline import caption

    name = "QwenImageEditPlusPipeline"
    small = replace(variants.VARIANTS[name], encoder_area=96**2, reference_area=128**2, target_area=128**2)
    monkeypatch.setitem(variants.VARIANTS, name, small)
    name = "QwenImageLayeredPipeline"
    monkeypatch.setitem(variants.VARIANTS, name, replace(variants.VARIANTS[name], resolutions=(96, 160)))
    monkeypatch.setattr(caption, "MAX_TOKENS", 4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(coarse).resize((150, 100), Image.Resampling.BICUBIC).save("photo.png")
    return tmp_path


@pytest.fixture
def run(here, models, capsys):
    def call(command, *arguments, model=None):
        kind = "edit" if command in ("edit", "compose") else "decompose"
        given = [command, *map(str, arguments)]
        if command != "compose" or "--harmonize" in given:
            given += ["--model", str(model or models[kind])]
        code = main(given)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture
def layers(run):
    """A folder of three layers, as decompose writes it."""
    code, _, err = run("decompose", "photo.png", "--layers", "3", "-o", "apart", *APART)
    assert code == 0, err
    return Path("apart")


def opened(result) -> Image.Image:
    code, (path,), err = result
    assert code == 0, err
    return Image.open(path)


def pixels(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image)).astype(int)


def stacked(images) -> Image.Image:
    result = images[0]
    for image in images[1:]:
        result = Image.alpha_composite(result, image)
    return result


@pytest.mark.slow
def test_an_image_is_decomposed(run):
    code, out, err = run("decompose", "photo.png", *APART)
    assert code == 0, err
    folder, psnr = out
    assert code == 0, err
    assert folder == "photo-layers"
    names = {path.name for path in Path(folder).iterdir()}
    assert names == {*(f"layer_{n}.png" for n in range(4)), "manifest.json", "composite.png", "contact_sheet.png"}
    manifest = json.loads(Path(folder, "manifest.json").read_text())
    assert (manifest["order"], manifest["size"], manifest["seed"]) == ("back to front", [150, 100], 3)
    assert manifest["prompt"] == "a fox"
    assert [layer["file"] for layer in manifest["layers"]] == [f"layer_{n}.png" for n in range(4)]
    assert all(layer["offset"] == [0, 0] for layer in manifest["layers"])
    images = [Image.open(Path(folder, f"layer_{n}.png")) for n in range(4)]
    assert {(image.mode, image.size) for image in images} == {("RGBA", (150, 100))}
    assert np.abs(pixels(stacked(images)) - pixels(Path(folder, "composite.png"))).max() <= 1
    on_white = stacked([Image.new("RGBA", (150, 100), "white"), *images])
    error = np.square(pixels(on_white)[..., :3] - pixels("photo.png")).mean()
    assert float(psnr.split()[1]) == pytest.approx(10 * np.log10(255**2 / error), abs=0.05)


@pytest.mark.slow
def test_a_second_run_gets_a_folder_of_its_own(run, layers):
    before = {path: path.read_bytes() for path in layers.iterdir()}
    code, (folder, _), err = run("decompose", "photo.png", "--layers", "1", "-o", layers, *APART)
    assert (code, folder) == (0, "apart-1"), err
    assert {path: path.read_bytes() for path in layers.iterdir()} == before
    assert "apart exists already" in err


@pytest.mark.slow
def test_two_runs_at_once_both_keep_their_layers(run, layers, monkeypatch):
    from qwen_image_mlx.layers import formats as layer_files

    free, taken = layer_files.free_folder, []

    def beaten(folder):
        place = free(folder)
        if not taken:
            taken.append(place)
            place.mkdir()
            (place / "other.txt").write_text("another run's")
        return place

    monkeypatch.setattr(layer_files, "free_folder", beaten)
    code, (folder, _), err = run("decompose", "photo.png", "--layers", "1", "-o", "raced", *APART)
    assert (code, folder) == (0, "raced-1"), err
    assert [path.name for path in Path("raced").iterdir()] == ["other.txt"]


@pytest.mark.slow
def test_formats_are_chosen(run):
    code, (folder, _), err = run("decompose", "photo.png", "--format", "png,psd,ora,zip,pptx", *APART)
    assert code == 0, err
    assert {"layers.psd", "layers.ora", "layers.zip", "layers.pptx"} < {path.name for path in Path(folder).iterdir()}
    from_folder = pixels(opened(run("compose", folder, "-o", "folder.png")))
    for name in ("layers.psd", "layers.ora", "layers.zip"):
        composed = opened(run("compose", Path(folder, name), "-o", f"{name}.png"))
        np.testing.assert_array_equal(pixels(composed), from_folder)


@pytest.mark.slow
def test_the_bucket_s_size_can_be_kept(run):
    _, (folder, _), _ = run("decompose", "photo.png", "--size", "bucket", *APART)
    assert Image.open(Path(folder, "layer_0.png")).size == size_of_area(96**2, (150, 100))


@pytest.mark.slow
def test_without_a_prompt_the_caption_is_recorded_and_cached(run):
    told = [*QUICK, "--resolution", "96", "--seed", "3", "--layers", "1", "--cache"]
    (_, (caption,), _) = run("caption", "photo.png", "--dtype", "float32")
    _, (folder, _), err = run("decompose", "photo.png", *told)
    assert "writing a caption" in err
    prompt = json.loads(Path(folder, "manifest.json").read_text())["prompt"]
    assert prompt
    assert f"caption: {prompt}" in err
    _, (again, _), err = run("decompose", "photo.png", *told)
    assert "writing a caption" not in err
    assert json.loads(Path(again, "manifest.json").read_text())["prompt"] == prompt
    assert caption


@pytest.mark.slow
def test_captions_are_not_written_with_a_text_encoder_that_is_read_for_every_word(run):
    told = ["photo.png", *QUICK, "--resolution", "96", "--layers", "1", "--memory", "streamed"]
    assert "--prompt" in error_line(run("decompose", *told))
    for more in (["--prompt", "a photo"], ["--force"]):
        code, (_, psnr), err = run("decompose", *told, *more)
        assert code == 0, err
        assert psnr.startswith("PSNR")


@pytest.mark.slow
def test_layers_are_laid_together_hidden_moved_and_scaled(run, layers):
    images = [Image.open(layers / f"layer_{n}.png") for n in range(3)]
    whole = opened(run("compose", layers))
    assert np.abs(pixels(whole) - pixels(stacked(images))).max() <= 1
    assert (whole.mode, Path("composition.png").is_file()) == ("RGBA", True)
    without = opened(run("compose", layers, "--hide", "1", "-o", "without.png"))
    assert np.abs(pixels(without) - pixels(stacked([images[0], images[2]]))).max() <= 1
    moved = opened(run("compose", layers, "--move", "2:+40,-10", "-o", "moved.png"))
    shifted = Image.new("RGBA", (150, 100))
    shifted.paste(images[2], (40, -10))
    seen = pixels(moved)[..., 3] > 0
    assert np.abs(pixels(moved) - pixels(stacked([*images[:2], shifted])))[seen].max() <= 1
    scaled = opened(run("compose", layers, "--hide", "1", "--hide", "2", "--scale", "0:0.5", "-o", "scaled.png"))
    alpha = pixels(scaled)[..., 3]
    assert alpha[:20].max() == 0
    assert alpha[40:60, 60:90].max() > 0


@pytest.mark.slow
def test_edited_layers_keep_their_alpha_and_their_place(run, layers):
    before = {path: path.read_bytes() for path in layers.glob("layer_*.png")}
    edited = opened(run("edit", "make it red", "--layer", f"{layers}:2", *QUICK, "--seed", "1"))
    original = Image.open(layers / "layer_2.png")
    np.testing.assert_array_equal(pixels(edited)[..., 3], pixels(original)[..., 3])
    assert np.abs(pixels(edited)[..., :3] - pixels(original)[..., :3]).mean() > 5
    assert Path(edited.filename).parent == layers
    assert {path: path.read_bytes() for path in before} == before
    images = [Image.open(layers / "layer_0.png"), Image.open(layers / "layer_1.png"), edited]
    assert np.abs(pixels(opened(run("compose", layers))) - pixels(stacked(images))).max() <= 1


@pytest.mark.slow
def test_an_edited_layer_is_generated_again_from_what_it_was(run, layers):
    edited = opened(run("edit", "make it red", "--layer", f"{layers}:2", *QUICK, "--seed", "1"))
    again = opened(run("edit", "--from-image", edited.filename, "-o", "again.png"))
    np.testing.assert_array_equal(pixels(again), pixels(edited))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--size", "96x48"], ["--seed", "6", "7"], ["--num-images", "2"], ["--size", "1mp"], ["--outpaint", "16,0,0,0"]],
)
def test_what_cannot_take_a_layer_s_place_needs_an_output(run, layers, flags):
    before = {path: path.read_bytes() for path in layers.iterdir()}
    assert "--output" in error_line(run("edit", "make it red", "--layer", f"{layers}:2", *QUICK, *flags))
    assert {path: path.read_bytes() for path in layers.iterdir()} == before
    assert run("edit", "make it red", "--layer", f"{layers}:2", "-o", "red.png", *QUICK, *flags)[0] == 0


@pytest.mark.slow
def test_a_composition_that_cannot_be_blended_leaves_nothing(run, layers, here):
    before = sorted(here.rglob("*"))
    assert "--steps is 0" in error_line(run("compose", layers, "--harmonize", "blend", "--steps", "0"))
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
def test_an_edited_layer_can_go_elsewhere_and_is_generated_again(run, layers):
    manifest = (layers / "manifest.json").read_bytes()
    opened(run("edit", "make it red", "--layer", f"{layers}:1", "-o", "red.png", *QUICK, "--seed", "1"))
    assert (layers / "manifest.json").read_bytes() == manifest
    opened(run("edit", "--from-image", "red.png", "-o", "again.png"))
    assert Path("red.png").read_bytes() == Path("again.png").read_bytes()


@pytest.mark.slow
def test_a_layer_is_decomposed_again(run, layers):
    code, (folder, _), err = run("decompose", "--layer", f"{layers}:1", "--layers", "2", *APART)
    assert code == 0, err
    assert folder == "apart-1-layers"
    assert Image.open(Path(folder, "layer_1.png")).size == (150, 100)


@pytest.mark.slow
def test_a_composition_is_harmonized(run, layers):
    blend = ["--harmonize", "match light and seams", *QUICK, "--seed", "5"]
    result = opened(run("compose", layers, "--hide", "2", "-o", "all.png", *blend))
    assert Path(result.filename).name == "all.png"
    assert result.size == (150, 100)
    composed = Image.open("all-composed.png")
    again = opened(run("edit", "match light and seams", "--image", "all-composed.png", "--size", "source",
                       "--keep-alpha", "-o", "again.png", *QUICK, "--seed", "5"))  # fmt: skip
    np.testing.assert_array_equal(pixels(result), pixels(again))
    assert composed.size == (150, 100)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "says"), [
    ((), "PHOTO"),
    (("photo.png", "--layer", "apart:1"), "one image"),
    (("none.png",), "none.png"),
    (("",), "name is empty"),
    (("photo.png", "--layers", "0"), "num_layers"),
    (("photo.png", "--layers", "9"), "from 1 to 8"),
    (("photo.png", "--resolution", "800"), "resolution is 800, but must be 96 or 160"),
    (("photo.png", "--resolution", "5"), "resolution is 5, but must be 96 or 160"),
    (("photo.png", "--size", "huge"), "source or bucket"),
    (("photo.png", "--format", "gif"), "gif"),
    (("photo.png", "--caption-language", "de"), "caption-language"),
    (("photo.png", "--output", "photo.png"), "photo.png"),
    (("clear.png",), "transparent"),
    (("--layer", "apart"), "apart:0"),
    (("--layer", "apart:7"), "0, the backmost, to 2"),
    (("--layer", "none:1"), "none"),
])  # fmt: skip
def test_bad_requests(run, layers, here, arguments, says):
    Image.new("RGBA", (50, 50)).save("clear.png")
    before = sorted(here.rglob("*"))
    assert says in error_line(run("decompose", *arguments, *(() if "--resolution" in arguments else APART[-6:])))
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "says"), [
    (("nowhere",), "nowhere"),
    (("photo.png",), "photo.png"),
    (("apart", "--hide", "3"), "layer 3 does not exist"),
    (("apart", "--move", "1:10"), "3:+40,-10"),
    (("apart", "--move", "1:ten,1"), "3:+40,-10"),
    (("apart", "--scale", "1:-2"), "positive"),
    (("apart", "--scale", "1:nan"), "positive"),
    (("apart", "--move", "1:1,1", "--move", "1:2,2"), "twice for one layer"),
    (("apart", "--seed", "3"), "--seed needs --harmonize"),
    (("apart", "--output", "out.jpg"), "out.jpg"),
])  # fmt: skip
def test_bad_compositions(run, layers, here, arguments, says):
    before = sorted(here.rglob("*"))
    assert says in error_line(run("compose", *arguments))
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
def test_models_must_be_layered(run, models, tiny):
    assert "use edit" in error_line(run("decompose", "photo.png", *APART, model=models["edit"]))
    assert "use generate" in error_line(run("decompose", "photo.png", *APART, model=tiny))
    assert "use decompose" in error_line(run("edit", "red", "--image", "photo.png", model=models["decompose"]))


@pytest.mark.slow
def test_a_manifest_never_leaves_its_folder(run, layers):
    manifest = json.loads((layers / "manifest.json").read_text())
    for file in ("../photo.png", str(Path("photo.png").resolve()), "gone.png"):
        manifest["layers"][0]["file"] = file
        (layers / "manifest.json").write_text(json.dumps(manifest))
        assert "lacks this file" in error_line(run("compose", layers))


@pytest.mark.slow
def test_a_manifest_that_changed_meanwhile_keeps_the_edit(run, layers, monkeypatch):
    from qwen_image_mlx.layers import recompose

    adopt, manifest = recompose.adopt_file, layers / "manifest.json"

    def after_a_change(*arguments):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layers": []}))
        adopt(*arguments)

    monkeypatch.setattr(recompose, "adopt_file", after_a_change)
    said = error_line(run("edit", "make it red", "--layer", f"{layers}:2", *QUICK, "--seed", "1"))
    assert "layer_2-edited.png is saved, but manifest.json was changed" in said
    assert (layers / "layer_2-edited.png").is_file()


@pytest.mark.slow
def test_a_distilled_lora_sets_how_images_are_decomposed(run, models, here):
    from lora_files import write_lora

    from qwen_image_mlx import QwenImagePipeline

    shapes = QwenImagePipeline.from_pretrained(models["decompose"]).components.lora_targets()
    write_lora(here / "Fox-Lightning-4steps-V1.0.safetensors", shapes)
    flags = [*APART[2:4], *APART[6:], "--lora", "Fox-Lightning-4steps-V1.0.safetensors", "--layers", "1"]

    def parameters(*more):
        code, (folder, _), err = run("decompose", "photo.png", *flags, *more)
        assert code == 0, err
        found = json.loads((Path(folder) / "manifest.json").read_text())
        return found["steps"], found["cfg_scale"], found["shift"]

    assert parameters() == (4, 1.0, 3.0)
    assert parameters("--steps", "2", "--cfg-scale", "1.5") == (2, 1.5, 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "layers.psd", "layers.ora", "layers.zip"])
def test_info_describes_layers(run, here, capsys, name):
    code, (folder, _), err = run("decompose", "photo.png", "--layers", "2", "--format", "png,psd,ora,zip", *APART)
    assert code == 0, err
    assert main(["info", str(Path(folder) / name), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layers"], facts["size"]) == (2, "150x100")


def test_an_image_that_shows_nothing_has_no_caption(run, here):
    Image.new("RGBA", (64, 64)).save("empty.png")
    assert "transparent everywhere" in error_line(run("caption", "empty.png"))


@pytest.mark.slow
def test_an_image_with_a_profile_is_one_image_in_every_file(run, here):
    """Of a wide image all that is made is as of the same image in sRGB, and carries no profile."""
    from qwen_image_mlx.images.colour import _matrix_profile
    from qwen_image_mlx.images.sources import open_image

    wide = _matrix_profile(1 / 2.2, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    Image.open("photo.png").save("wide.png", icc_profile=wide)
    open_image("wide.png").save("converted.png")
    made = {}
    for name, words in {"wide": ["wide.png"], "converted": ["converted.png"], "plain": ["photo.png"],
                        "ignored": ["wide.png", "--ignore-profile"]}.items():  # fmt: skip
        code, (folder, _), err = run("decompose", *words, "-o", name, "--format", "png,psd,ora,zip", *APART)
        assert code == 0, err
        assert ("has the colour profile" in err) is (name == "wide")
        images = [opened(run("compose", f"{folder}{file}", "-o", f"{name}-laid.png")) for file in
                  ("", "/layers.psd", "/layers.ora", "/layers.zip")]  # fmt: skip
        images += [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
        assert not any("icc_profile" in image.info for image in images)
        made[name] = [image.tobytes() for image in images]
    assert made["wide"] == made["converted"]
    assert made["ignored"] == made["plain"] != made["wide"]


@pytest.mark.slow
def test_layers_of_several_profiles_are_laid_together_in_srgb(run, layers):
    from qwen_image_mlx.images.colour import _matrix_profile
    from qwen_image_mlx.images.sources import open_rgba

    for number, gamma in enumerate((1 / 1.8, 1 / 2.6)):
        tagged = Image.open(layers / f"layer_{number}.png").convert("RGBA")
        tagged.putalpha(128)
        tagged.save(layers / f"layer_{number}.png", icc_profile=_matrix_profile(gamma, (
            0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)))  # fmt: skip
    expected = stacked([open_rgba(layers / f"layer_{number}.png") for number in range(2)])
    laid = opened(run("compose", layers, "--hide", "2", "-o", "laid.png"))
    assert np.abs(pixels(laid) - pixels(expected)).max() <= 1
    numbers = stacked([Image.open(layers / f"layer_{number}.png") for number in range(2)])
    ignored = opened(run("compose", layers, "--hide", "2", "--ignore-profile", "-o", "ignored.png"))
    assert np.abs(pixels(ignored) - pixels(numbers)).max() <= 1
    assert np.abs(pixels(ignored) - pixels(laid)).max() > 10
