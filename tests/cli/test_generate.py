"""The command line: the reference's image, one line for every fault, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, heeding, stages
from PIL import Image

from qwen_image_mlx import __version__
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.variants import ASPECT_SIZES, NEGATIVE_2512

SMALL = ["--width", "64", "--height", "48", "--steps", "2", "--dtype", "float32"]


@pytest.fixture
def run(here, tiny, capsys):
    """Runs a command in this process: (exit code, lines of stdout, stderr)."""

    def call(*arguments, model=tiny):
        given = [str(a) for a in arguments]
        if given and given[0] == "generate" and model is not None:
            given += ["--model", str(model)]
        code = main(given)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


# --- what it generates ------------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize(("size", "flags", "request_"), [
    ((64, 48), ["--negative-prompt", "blurry"], {"negative_prompt": "blurry", "cfg_scale": 4.0}),
    ((80, 112), ["--cfg-scale", "1"], {"cfg_scale": 1.0}),
    ((112, 48), [], {"negative_prompt": NEGATIVE_2512, "cfg_scale": 4.0}),
], ids=["guided", "unguided", "recommended negative prompt"])  # fmt: skip
@pytest.mark.parametrize("prompt", ["a red fox", "一只狐狸 🦊"])
def test_the_png_is_the_reference_s_within_one_level(run, reference, prompt, size, flags, request_):
    from reference import run_reference

    width, height = size
    code, out, _ = run(
        "generate",
        prompt,
        "--width",
        width,
        "--height",
        height,
        "--steps",
        4,
        "--seed",
        42,
        "--dtype",
        "float32",
        *flags,
    )
    assert (code, out) == (0, ["qwen-image.png"])
    expected = run_reference(reference, prompt=prompt, width=width, height=height, steps=4, seed=42, **request_).image
    image = Image.open("qwen-image.png")
    assert (image.mode, image.size, image.format) == ("RGB", size, "PNG")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.reference
def test_num_images_are_the_reference_s_num_images_per_prompt(run, reference):
    from reference import run_reference

    _, out, _ = run("generate", "a fox", *SMALL, "--cfg-scale", 1, "--seed", 3, "--num-images", 2)
    images = run_reference(
        reference, prompt="a fox", width=64, height=48, steps=2, cfg_scale=1.0, seed=3, num_images=2
    ).images
    for path, expected in zip(out, images, strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_every_official_aspect_is_a_size_that_can_be_generated():
    from qwen_image_mlx import GenerationParameters

    assert list(ASPECT_SIZES) == ["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"]
    for aspect, (width, height) in ASPECT_SIZES.items():
        GenerationParameters(width=width, height=height)
        across, down = map(int, aspect.split(":"))
        assert abs(width / height - across / down) < 0.02


def test_default_size_is_the_first_bucket(monkeypatch, run):
    sizes = []
    monkeypatch.setattr("qwen_image_mlx.cli.output.check_writable", lambda path, nbytes: sizes.append(nbytes))
    for flags in ([], ["--aspect", "16:9"]):
        run("generate", "a fox", *flags, model="./none")
    assert sizes == [3 * 1328 * 1328, 3 * 1664 * 928]


# --- files and metadata ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_image_carries_its_parameters_and_can_be_painted_again(run, tiny):
    code, out, _ = run("generate", "a fox 🦊", *SMALL, "-n", "blurry", "--seed", 9, 10, "--num-images", 2, "-g", 2.5)
    assert (code, out) == (0, ["qwen-image.png", "qwen-image-1.png", "qwen-image-2.png", "qwen-image-3.png"])
    code, out, _ = run("info", "qwen-image-3.png", "--json")
    assert code == 0
    assert json.loads("\n".join(out)) == {
        "model": str(tiny), "revision": None, "prompt": "a fox 🦊", "negative_prompt": "blurry", "width": 64,
        "height": 48, "steps": 2, "cfg_scale": 2.5, "seed": 10, "image_index": 1, "rng": "torch", "sigmas": None,
        "shift": None, "strength": None, "dtype": "float32", "quantize": None, "loras": None, "version": __version__,
        "transformer": None, "text_encoder": None, "vae": None,
    }  # fmt: skip
    _, lines, _ = run("info", "qwen-image-3.png")
    assert dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)["seed"] == "10"
    code, out, _ = run("generate", "--from-image", "qwen-image-3.png", "-o", "again.png", model=None)
    assert (code, out) == (0, ["again.png"])
    assert Path("again.png").read_bytes() == Path("qwen-image-3.png").read_bytes()


@pytest.mark.slow
def test_flags_win_over_an_image_s_parameters(run):
    run("generate", "a fox", *SMALL, "--seed", 1, "-o", "one.png")
    _, (path,), _ = run("generate", "a wolf", "--from-image", "one.png", "--seed", 2, "--steps", 3, "-o", "two.png")
    _, out, _ = run("info", path, "--json")
    metadata = json.loads("\n".join(out))
    assert (metadata["prompt"], metadata["seed"], metadata["steps"], metadata["width"]) == ("a wolf", 2, 3, 64)


def test_an_existing_file_is_never_replaced(run):
    Path("fox.png").write_bytes(b"mine")
    code, out, err = run("generate", "a fox", *SMALL, "-o", "fox.png")
    assert (code, out) == (0, ["fox-1.png"])
    assert "fox.png exists already; saved as fox-1.png" in err
    assert Path("fox.png").read_bytes() == b"mine"
    assert sorted(os.listdir()) == ["fox-1.png", "fox.png"]


@pytest.mark.slow
def test_output_may_be_a_directory_or_need_one(run):
    Path("images").mkdir()
    assert run("generate", "a fox", *SMALL, "-o", "images")[1] == ["images/qwen-image.png"]
    assert run("generate", "a fox", *SMALL, "-o", "new/deep/fox")[1] == ["new/deep/fox.png"]


def test_progress_goes_to_stderr_and_only_paths_to_stdout(run):
    _, out, err = run("generate", "a fox", *SMALL)
    assert out == ["qwen-image.png"]
    assert [line.partition(",")[0] for line in err.splitlines() if "/" in line] == ["denoising 2/2"]


def test_an_empty_prompt_is_generated_and_said(run):
    code, _, err = run("generate", "", *SMALL)
    assert code == 0
    assert "prompt is empty" in err


@pytest.mark.slow
def test_a_prompt_over_the_limit_is_cut_and_said(run):
    code, _, err = run("generate", "one two three four " * 200, *SMALL, "--cfg-scale", 1)
    assert code == 0
    assert "warning: the prompt is cut" in err


# --- bad input: flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "says"), [
    (["--width", "1000", "--height", "64"], "992 and 1008"),
    (["--width", "64"], "--height"),
    (["--width", "0", "--height", "64"], "width"),
    (["--width", "64", "--height", "64", "--aspect", "1:1"], "one size only"),
    (["--aspect", "5:4"], "16:9"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "-4"], "--steps is -4"),
    (["--steps", "many"], "--steps"),
    (["--cfg-scale", "0.5"], "cfg_scale"),
    (["--cfg-scale", "nan"], "cfg_scale"),
    (["--seed", "-2"], "seed"),
    (["--seed", str(2**64)], "seed"),
    (["--num-images", "0"], "images"),
    (["--dtype", "int8"], "bfloat16"),
    (["--rng", "numpy"], "torch"),
    (["--output", "fox.bmp"], ".png"),
    (["--nonsense"], "--nonsense"),
    (["--from-image", "none.png"], "none.png"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_flags(run, here, flags, says):
    assert says in error_line(run("generate", "a fox", *flags))
    assert not list(here.iterdir())


def test_no_prompt_and_no_command(run):
    assert "prompt is missing" in error_line(run("generate"))
    assert "COMMAND" in error_line(run())


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_info_of_what_is_no_image_of_ours(run, content):
    Path("file.png").write_bytes(content)
    assert "file.png" in error_line(run("info", "file.png"))
    Image.new("RGB", (8, 8)).save("foreign.png")
    assert "carries no parameters" in error_line(run("info", "foreign.png"))
    assert "the image none.png does not exist" in error_line(run("info", "none.png"))


@pytest.mark.parametrize("metadata", ["[]", "{broken", '{"prompt": 3}', '{"prompt": "x", "steps": "a"}'])
def test_an_image_with_damaged_parameters(run, metadata):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("qwen_image_mlx", metadata)
    Image.new("RGB", (8, 8)).save("bad.png", pnginfo=info)
    error_line(run("generate", "--from-image", "bad.png"))


# --- bad input: checkpoints -----------------------------------------------------------------------------------------


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def lie_about_shape(header) -> None:
    header["proj_out.weight"]["shape"][0] += 1


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "no model_index.json": (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
    "model_index.json is not JSON": (lambda m: (m / "model_index.json").write_text("{"), "model_index.json"),
    "unknown pipeline class": (lambda m: edit_json(m / "model_index.json", _class_name="MyPipeline"), "MyPipeline"),
    "another model": (
        lambda m: edit_json(m / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline",
    ),
    "another transformer": (
        lambda m: edit_json(m / "transformer/config.json", _class_name="FluxTransformer2DModel"),
        "FluxTransformer2DModel",
    ),
    "ill-typed config": (lambda m: edit_json(m / "transformer/config.json", num_layers="2"), "num_layers"),
    "endless config": (lambda m: edit_json(m / "transformer/config.json", num_layers=10**9), "at most 1,000 work"),
    "config without bounds": (
        lambda m: edit_json(m / "transformer/config.json", num_attention_heads=10**400),
        "num_attention_heads",
    ),
    "config of no numbers": (
        lambda m: edit_json(m / "scheduler/scheduler_config.json", base_shift=1e999),
        "base_shift",
    ),
    "impossible config": (
        lambda m: edit_json(m / "transformer/config.json", axes_dims_rope=[8, 12, 14]),
        "axes_dims_rope",
    ),
    "no transformer": (lambda m: (m / TRANSFORMER).unlink(), "transformer"),
    "truncated file": (lambda m: os.truncate(m / TRANSFORMER, 5000), "diffusion_pytorch_model.safetensors"),
    "empty file": (lambda m: os.truncate(m / TRANSFORMER, 0), "diffusion_pytorch_model.safetensors"),
    "lying header": (lambda m: rewrite_header(m / TRANSFORMER, lie_about_shape), "proj_out.weight"),
    "missing tensor": (lambda m: edit_tensors(m / TRANSFORMER, lambda t: t.pop("img_in.weight")), "img_in.weight"),
    "missing modulation": (
        lambda m: edit_tensors(m / TRANSFORMER, lambda t: t.pop("norm_out.linear.bias")),
        "norm_out.linear.bias",
    ),
    "unexpected tensor": (
        lambda m: edit_tensors(m / TRANSFORMER, lambda t: t.update(stranger=np.ones(3, np.float32))),
        "stranger",
    ),
    "wrong shape": (
        lambda m: edit_tensors(m / TRANSFORMER, lambda t: t.update({"img_in.bias": np.ones(7, np.float32)})),
        "img_in.bias",
    ),
    "wrong dtype": (
        lambda m: edit_tensors(m / TRANSFORMER, lambda t: t.update({"img_in.bias": np.ones(96, np.int32)})),
        "img_in.bias",
    ),
    "more layers than weights": (
        lambda m: edit_json(m / "transformer/config.json", num_layers=3),
        "transformer_blocks.2",
    ),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "text_encoder"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "broken tokenizer": (lambda m: (m / "tokenizer/tokenizer.json").write_text("{"), "tokenizer"),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), "vae"),
    "odd scheduler": (lambda m: edit_json(m / "scheduler/scheduler_config.json", use_karras_sigmas=True), "karras"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_before_anything_is_generated(run, here, tiny, damage):
    model = here / "model"
    shutil.copytree(tiny, model)
    harm, says = DAMAGES[damage]
    harm(model)
    given = ["generate", "a fox", *SMALL, "-o", "fox.png"]
    assert says in error_line(run(*given, model=model))
    assert "load text_encoder" not in stages(run(*given, "--json", model=model))
    assert os.listdir(here) == ["model"]


@pytest.mark.parametrize("model", ["./none", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there(run, model):
    assert model in error_line(run("generate", "a fox", *SMALL, model=model))


@pytest.mark.process
def test_no_network_and_nothing_cached(here, tiny):
    environment = {
        **os.environ,
        "HF_HOME": str(here / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "qwen_image_mlx", "generate", "a fox", *SMALL],
            env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert "Qwen/Qwen-Image-2512" in done.stderr
        assert "Traceback" not in done.stderr


# --- bad input: the machine -----------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_said_before_any_work(run):
    Path("file").write_text("x")
    for output in ("file/fox.png", "/proc/nowhere/fox.png"):
        given = ["generate", "a fox", *SMALL, "-o", output]
        assert "cannot write" in error_line(run(*given))
        assert stages(run(*given, "--json")) == set()


def test_a_full_disk_is_said_before_any_work(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    assert "free some space" in error_line(run("generate", "a fox", *SMALL))


def test_a_disk_that_fills_up_while_saving_leaves_nothing_behind(run, here, monkeypatch):
    def full(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "disk is full" in error_line(run("generate", "a fox", *SMALL))
    assert not list(here.iterdir())


@pytest.mark.process
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_ended_leaves_nothing(here, tiny, sent, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_image_mlx", "generate", "a fox", "--model", str(tiny), "--width", "64",
         "--height", "64", "--steps", "900", "--preview"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding(sent),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(here.iterdir()) and time.monotonic() < deadline:  # the preview of the first step
        time.sleep(0.05)
    assert list(here.iterdir())
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert not list(here.iterdir())


def test_help_and_version(capsys):
    for arguments in (["--help"], ["generate", "--help"], ["info", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out
