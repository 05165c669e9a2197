"""A prompt on stdin, seeds nobody has chosen, names with a seed, and words without an effect."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from commands import error_line
from PIL import Image

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.files import read_metadata

DEMO = ["--model", "demo", "--steps", "2"]


@pytest.fixture
def run(here, capsys, monkeypatch):
    """Runs a command in this process, with a text on stdin: (exit code, lines of stdout, stderr)."""

    def call(*arguments, stdin=None):
        if stdin is not None:
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.mark.parametrize(("stdin", "prompt"), [
    ("a red circle\n", "a red circle"), ("\ufeffa fox\r\n", "a fox"), ("two\nlines", "two\nlines"),
])  # fmt: skip
def test_a_dash_is_the_prompt_on_stdin(run, stdin, prompt):
    code, _, err = run("generate", "-", *DEMO, stdin=stdin)
    assert code == 0, err
    assert read_metadata("qwen-image.png")["prompt"] == prompt


@pytest.mark.slow
def test_many_images_and_layers_read_it_too(run):
    code, out, err = run("generate", "-", *DEMO, "--seeds", "1-2", stdin="a red circle")
    assert (code, len(out)) == (0, 2), err
    Image.new("RGB", (64, 64), "red").save("a.png")
    code, _, err = run("decompose", "a.png", "--prompt", "-", "--model", "demo-layered", "--steps", 2, "--layers", 2,
                       stdin="a red image")  # fmt: skip
    assert code == 0, err
    assert json.loads(Path("a-layers/manifest.json").read_text())["prompt"] == "a red image"


@pytest.mark.parametrize(("stdin", "said"), [
    ("", "stdin is empty"), ("\n\n", "stdin is empty"), (b"\xff\xfe", "not text in UTF-8"),
    (b"x" * 1_000_001, "too much for a prompt"),
])  # fmt: skip
def test_what_is_not_a_prompt_on_stdin(run, stdin, said):
    assert said in error_line(run("generate", "-", *DEMO, stdin=stdin))


def test_a_negative_prompt_is_not_read_from_stdin(run):
    assert "only the prompt is read from stdin" in error_line(run("generate", "x", "-n", "-", *DEMO, stdin="x"))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[-1], [7, -1]])
def test_a_random_seed_is_said_and_recorded(run, seeds):
    code, out, err = run("generate", "a red circle", *DEMO, "--seed", *seeds)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("seed ")]
    assert line == "seed " + ", ".join(str(read_metadata(path)["seed"]) for path in out)
    assert ", ".join(map(str, seeds[:-1])) in line


@pytest.mark.slow
def test_random_seeds_of_other_commands(run):
    Image.new("RGB", (64, 64), "red").save("a.png")
    code, _, err = run("decompose", "a.png", "--prompt", "x", "--model", "demo-layered", "--steps", 2, "--seed", -1)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("seed ")]
    assert line == f"seed {json.loads(Path('a-layers/manifest.json').read_text())['seed']}"
    Path("a.jsonl").write_text('{"prompt": "x", "seed": -1}\n')
    for flags in (["x", "--seeds", "1-2", "--seed", "-1"], ["--prompts-file", "a.jsonl"]):
        assert "seed is -1, a random one" in error_line(run("generate", *flags, *DEMO))


@pytest.mark.slow
@pytest.mark.parametrize(("output", "names"), [
    ("out-{seed}.png", ["out-3.png", "out-3-1.png", "out-9.png", "out-9-1.png"]),
    ("{seed}/a.png", ["3/a.png", "3/a-1.png", "9/a.png", "9/a-1.png"]),
    ("a.png", ["a.png", "a-1.png", "a-2.png", "a-3.png"]),
])  # fmt: skip
def test_a_name_may_hold_the_seed(run, output, names):
    code, out, err = run("generate", "x", *DEMO, "--seed", 3, 9, "--num-images", 2, "--output", output)
    assert (code, out) == (0, names), err
    assert "warning" not in err
    assert "generated again by itself: --from-image FILE" in err
    run("generate", "--from-image", names[3], "--output", "again.png")
    assert Image.open("again.png").tobytes() == Image.open(names[3]).tobytes()


@pytest.mark.slow
def test_a_folder_of_layers_may_hold_the_seed(run):
    Image.new("RGB", (64, 64), "red").save("a.png")
    code, out, _ = run("decompose", "a.png", "--prompt", "x", "--model", "demo-layered", "--steps", 2, "--seed", 5,
                       "--output", "l-{seed}")  # fmt: skip
    assert (code, out[0]) == (0, "l-5")


@pytest.mark.parametrize(("arguments", "said"), [
    (["generate", "x", *DEMO, "--output", "{date}.png"],
     "--output has {date}, but only {seed}, {index}, {prompt} are filled in"),
    (["generate", "x", *DEMO, "--output", "{}.png"],
     "--output has {}, but only {seed}, {index}, {prompt} are filled in"),
    (["generate", "x", *DEMO, "--seeds", "1-2", "--output", "{seed}"], "--output has {seed}, but the saved files"),
    (["compose", "a", "--output", "{seed}.png"], "--output has {seed}, but the saved files have no single seed"),
])  # fmt: skip
def test_other_placeholders_are_refused(run, arguments, said):
    assert said in error_line(run(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "warned"), [
    (["-n", "blue", "--cfg-scale", "1"], True), (["-n", "blue", "--cfg-scale", "2"], False),
    (["--cfg-scale", "1"], False), (["-n", " ", "--cfg-scale", "1"], False),
    (["-n", "blue", "--cfg-scale", "1", "--seeds", "1-3"], True),
])  # fmt: skip
def test_a_negative_prompt_without_guidance_is_said_once(run, flags, warned):
    code, _, err = run("generate", "x", *DEMO, *flags)
    assert code == 0, err
    assert err.count("the negative prompt has no effect: guidance is 1") == warned


@pytest.mark.parametrize("model", ["demo", "demo-edit", "demo-layered"])
def test_a_model_without_a_captioner_says_so(run, model):
    Image.new("RGB", (64, 64), "red").save("a.png")
    said = error_line(run("caption", "a.png", "--model", model))
    assert f"{model} cannot write captions" in said
    assert "download" not in said


@pytest.mark.slow
def test_a_generated_image_is_not_an_edit(run):
    run("generate", "a red circle", *DEMO)
    said = error_line(run("edit", "--from-image", "qwen-image.png", "--model", "demo-edit"))
    assert "qwen-image.png was generated from text, not edited" in said
    assert "`generate --from-image`" in said
