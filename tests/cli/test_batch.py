"""Many images: everything loaded once, the single command's pixels, and nothing generated twice."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from commands import error_line
from PIL import Image

from qwen_image_mlx import RequestError
from qwen_image_mlx.cli.batch import _seeds
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.files import read_metadata
from qwen_image_mlx.pipeline.reporter import Reporter

SMALL = ["--width", "64", "--height", "48", "--steps", "2", "--dtype", "float32"]


@pytest.fixture
def run(here, tiny, capsys):
    """Runs generate in this process: (exit code, lines of stdout, stderr)."""

    def call(*arguments, model=tiny):
        code = main(["generate", *map(str, arguments), "--model", str(model)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture
def stages(monkeypatch):
    """Every stage that begins, in order, as "stage detail"."""
    found = []
    report = Reporter.__call__

    def told(self, progress):
        if progress.step == 0:
            found.append(f"{progress.stage} {progress.detail}".strip())
        report(self, progress)

    monkeypatch.setattr(Reporter, "__call__", told)
    return found


def said(path) -> tuple:
    metadata = read_metadata(path)
    return metadata["prompt"], metadata["seed"], metadata["image_index"]


# --- what it generates ---


@pytest.mark.slow
def test_lines_of_text_times_seeds(run):
    Path("p.txt").write_text("# animals\na fox\n\n  a wolf  \r\n一只狐狸\n", encoding="utf-8-sig")
    code, out, _ = run("--prompts-file", "p.txt", "--seeds", "3,7-8", *SMALL)
    assert code == 0
    assert [said(path) for path in out] == [(p, s, 0) for p in ("a fox", "a wolf", "一只狐狸") for s in (3, 7, 8)]
    assert {Path(path).parent.name for path in out} == {"qwen-images"}
    assert sorted(Path(path).name for path in out) == sorted(os.listdir("qwen-images"))
    assert Path(out[0]).name.startswith("a-fox-seed3-")
    assert Path(out[-1]).name.startswith("一只狐狸-seed8-")


@pytest.mark.slow
def test_images_are_those_of_the_single_command(run):
    Path("p.jsonl").write_text(
        json.dumps({"prompt": "a fox", "seed": 4, "negative_prompt": "blurry", "cfg_scale": 2.5, "num_images": 2})
        + "\n\n"
        + json.dumps({"prompt": "a fox", "width": 48, "height": 64, "steps": 3, "cfg_scale": 1, "rng": "mlx"})
    )
    _, out, _ = run("--prompts-file", "p.jsonl", *SMALL, "-o", "many", "--seed", 9)
    _, first, _ = run("a fox", *SMALL, "--seed", 4, "-n", "blurry", "-g", 2.5, "--num-images", 2, "-o", "a.png")
    _, second, _ = run(
        "a fox", "--width", 48, "--height", 64, "--steps", 3, "-g", 1, "--rng", "mlx", "--seed", 9, "--dtype",
        "float32", "-o", "b.png",
    )  # fmt: skip
    assert len(out) == 3
    for many, single in zip(out, [*first, *second], strict=True):
        assert Path(many).read_bytes() == Path(single).read_bytes()


@pytest.mark.slow
def test_everything_is_loaded_once_and_the_encoders_before_the_painter(run, stages):
    Path("p.txt").write_text("a fox\na wolf\na bear\na fox\n")
    code, out, _ = run("--prompts-file", "p.txt", "--seeds", "1-2", *SMALL)
    assert (code, len(out)) == (0, 6)
    loads = [stage for stage in stages if stage.startswith("load")]
    assert sorted(loads) == sorted(set(loads))
    assert {"load tokenizer", "load text_encoder", "load transformer", "load modulation", "load vae_decoder"} == set(
        loads
    )
    assert [stages.count(stage) for stage in ("encode prompts", "denoise", "decode")] == [3, 6, 6]
    last = max(n for n, stage in enumerate(stages) if stage == "encode prompts")
    assert last < stages.index("load modulation")


@pytest.mark.slow
def test_a_schedule_s_table_is_made_once_whatever_the_order(run, stages):
    lines = [{"prompt": f"fox {n}", "steps": 2 + n % 2} for n in range(6)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(run("--prompts-file", "p.jsonl", *SMALL)[1]) == 6
    assert stages.count("load modulation") == 2


@pytest.mark.slow
def test_seeds_alone_make_a_folder_of_one_prompt(run):
    _, out, _ = run("a fox", "--seeds", "5-7", *SMALL, "-o", "foxes")
    assert [said(path) for path in out] == [("a fox", seed, 0) for seed in (5, 6, 7)]
    assert {str(Path(path).parent) for path in out} == {"foxes"}


def test_without_a_seed_every_prompt_has_seed_0(run):
    Path("p.txt").write_text("a fox\n")
    assert [said(path) for path in run("--prompts-file", "p.txt", *SMALL)[1]] == [("a fox", 0, 0)]


def test_the_plan_is_made_for_the_largest_image(run, monkeypatch):
    planned = []

    def refuse(session, request, parallel):
        planned.append((request, session.memory, session.force))
        raise RequestError("too large")

    monkeypatch.setattr("qwen_image_mlx.runtime.session.Session.plan", refuse)
    lines = [
        {"prompt": "a", "width": 2048, "height": 1024, "cfg_scale": 1},
        {"prompt": "b", "negative_prompt": "dull"},
        {"prompt": "c", "steps": 9},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "too large" in error_line(run("--prompts-file", "p.jsonl", *SMALL, "--memory", "1GB", "--force"))
    ((request, memory, force),) = planned
    parameters = request.parameters
    assert (parameters.width, parameters.height, parameters.num_inference_steps) == (2048, 1024, 9)
    assert parameters.cfg_scale > 1
    assert request.negative_prompt == "dull"
    assert (len(request.image_indices), memory.budget, force) == (3, 10**9, True)


def test_a_preview_follows_the_image_that_is_painted(run, monkeypatch):
    from qwen_image_mlx.runtime.preview import Preview

    seen = []
    whole = Preview.__call__

    def watched(self, progress):
        whole(self, progress)
        if progress.stage == "denoise" and progress.step:
            seen.append(Image.open("out/qwen-image-preview.png").size)

    monkeypatch.setattr(Preview, "__call__", watched)
    Path("p.jsonl").write_text('{"prompt": "a", "width": 96, "height": 32}\n{"prompt": "b"}\n')
    code, out, _ = run("--prompts-file", "p.jsonl", *SMALL, "--preview", "-o", "out")
    assert (code, len(out)) == (0, 2)
    assert seen == [(96, 32)] * 2 + [(64, 48)] * 2
    assert len(os.listdir("out")) == 2


# --- going on ---


@pytest.mark.slow
def test_a_second_run_generates_what_is_missing(run, stages):
    Path("p.txt").write_text("a fox\na wolf\n")
    _, first, _ = run("--prompts-file", "p.txt", "--seeds", "1-2", *SMALL)
    before = {path: Path(path).read_bytes() for path in first}
    Path("p.txt").write_text("a bear\na wolf\na fox\n")
    code, out, err = run("--prompts-file", "p.txt", "--seeds", "1-2", *SMALL)
    assert (code, [said(path)[:2] for path in out]) == (0, [("a bear", 1), ("a bear", 2)])
    assert "4 of 6 images are in qwen-images already" in err
    assert {path: Path(path).read_bytes() for path in first} == before
    stages.clear()
    code, out, err = run("--prompts-file", "p.txt", "--seeds", "1-2", *SMALL)
    assert (code, out, stages) == (0, [], [])
    assert "6 of 6 images" in err


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    ["--steps", "3"], ["-g", "2"], ["-n", "dull"], ["--rng", "mlx"], ["--dtype", "bfloat16"], ["--quantize", "4"],
    ["--lora-mode", "side"],
])  # fmt: skip
def test_what_is_asked_for_otherwise_is_generated_anew(run, change):
    assert len(run("a fox", "--seeds", "1", *SMALL)[1]) == 1
    assert len(run("a fox", "--seeds", "1", *SMALL, *change)[1]) == 1
    assert len(os.listdir("qwen-images")) == 2


@pytest.mark.slow
def test_only_a_whole_image_that_says_so_counts(run):
    _, (path,), _ = run("a fox", "--seeds", "1", *SMALL)
    whole = Path(path).read_bytes()
    _, (wolf,), _ = run("a wolf", "--seeds", "1", *SMALL)
    for other in (whole[:-200], b"", b"mine", Path(wolf).read_bytes()):
        Path(path).write_bytes(other)
        _, (beside,), _ = run("a fox", "--seeds", "1", *SMALL)
        assert beside == path.replace(".png", "-1.png")
        assert (Path(beside).read_bytes(), Path(path).read_bytes()) == (whole, other)
        assert run("a fox", "--seeds", "1", *SMALL)[1] == []
        Path(beside).unlink()
    Image.new("RGB", (64, 48)).save(path)
    assert len(run("a fox", "--seeds", "1", *SMALL)[1]) == 1


@pytest.mark.slow
def test_ctrl_c_loses_nothing_that_is_finished(run, monkeypatch):
    from qwen_image_mlx.pipeline.pipeline import QwenImagePipeline

    decode = QwenImagePipeline.decode_frames
    done = []

    def interrupted(self, *arguments, **options):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return decode(self, *arguments, **options)

    monkeypatch.setattr(QwenImagePipeline, "decode_frames", interrupted)
    code, out, err = run("a fox", "--seeds", "1-4", *SMALL, "--preview")
    assert (code, len(out)) == (130, 2)
    assert "interrupted" in err
    assert sorted(out) == sorted(f"qwen-images/{name}" for name in os.listdir("qwen-images"))
    _, rest, _ = run("a fox", "--seeds", "1-4", *SMALL)
    assert [said(path)[1] for path in rest] == [3, 4]


# --- bad input ---


@pytest.mark.parametrize(("text", "says"), [
    ("", "holds no prompts"),
    ("\n\n", "holds no prompts"),
    ('{"prompt": "a"}\n["a"]', "p.jsonl, line 2: this is not a JSON object"),
    ('{"prompt": "a"', "line 1: this is not JSON"),
    ("[" * 100_000, "line 1: this is not JSON"),
    ('{"seed": 1}', "line 1: the prompt is missing"),
    ('{"prompt": 3}', "line 1: prompt is 3"),
    ('{"prompt": null, "seed": 1}', "line 1: the prompt is missing"),
    ('{"prompt": "\\ud800"}', "line 1: prompt is '\\ud800'"),
    ('{"prompt": "a", "negative_prompt": 1}', "line 1: negative_prompt is 1"),
    ('{"prompt": "a", "negative_promt": "b"}', "line 1: 'negative_promt' is not a key: did you mean negative_prompt?"),
    ('{"prompt": "a", "zzz": "b"}', "'zzz' is not a key: the keys are prompt,"),
    ('{"prompt": "a"}\n\n{"prompt": "a", "seed": -1}', "line 3: seed is -1"),
    ('{"prompt": "a", "seed": [1]}', "line 1: seed is [1]"),
    ('{"prompt": "a", "seed": true}', "line 1: seed is True"),
    ('{"prompt": "a", "steps": 0}', "line 1: steps is 0, but must be an integer from 1 to 1000"),
    ('{"prompt": "a", "steps": "4"}', "line 1: steps is '4'"),
    ('{"prompt": "a", "cfg_scale": NaN}', "line 1: cfg_scale is nan"),
    ('{"prompt": "a", "rng": "dice"}', "line 1: rng is 'dice'"),
    ('{"prompt": "a", "num_images": "2"}', "line 1: num_images is"),
    ('{"prompt": "a", "num_images": 99999}', "line 1: num_images is"),
    ('{"prompt": "a", "width": 64}', "line 1: give both width and height"),
    ('{"prompt": "a", "width": 64, "height": [64]}', "line 1: height is [64]"),
    ('{"prompt": "a", "width": 60, "height": 64}', "line 1: width is 60"),
    ('{"prompt": "a", "width": 64, "height": 64, "aspect": "1:1"}', "line 1: give one size only"),
    ('{"prompt": "a", "aspect": "5:4"}', "line 1: aspect is '5:4'"),
    ('{"prompt": "a", "aspect": ["1:1"]}', "line 1: aspect is ['1:1']"),
    ('{"prompt": "a", "num_images": 6000}\n{"prompt": "b", "num_images": 6000}', "these are 12,000 images"),
])  # fmt: skip
def test_bad_lines_are_refused_before_anything_is_loaded(run, text, says, stages):
    Path("p.jsonl").write_text(text)
    assert says in error_line(run("--prompts-file", "p.jsonl", model="./none"))
    assert stages == []
    assert os.listdir() == ["p.jsonl"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--prompts-file", "none.txt"], "No such file"),
    (["--prompts-file", "folder.txt"], "cannot be read"),
    (["--prompts-file", "pipe.txt"], "it is not a regular file"),
    (["--prompts-file", "zero.txt"], "it is not a regular file"),
    (["--prompts-file", "latin.txt"], "latin.txt is not text in UTF-8"),
    (["--prompts-file", "p.csv"], "must end in .txt or .jsonl"),
    (["--prompts-file", "\0.txt"], "leads nowhere"),
    (["--prompts-file", "~nosuchuser/p.txt"], "--prompts-file is '~nosuchuser/p.txt', which leads nowhere"),
    (["--prompts-file", ""], "--prompts-file is empty"),
    (["a fox", "--seeds", "1", "-o", "~nosuchuser/x"], "--output is '~nosuchuser/x', which leads nowhere"),
    (["a fox", "--seeds", "1", "-o", "a" * 300], "which leads nowhere: file name too long"),
    (["a fox", "--seeds", "1", "-o", ""], "--output is empty"),
    (["a fox", "--prompts-file", "p.txt"], "one source of prompts"),
    (["--seeds", "1-2"], "one source of prompts"),
    (["a fox", "--seeds", "5-1"], "5-1, which runs backwards"),
    (["a fox", "--seeds", "1-20000"], "more than 10,000 seeds"),
    (["a fox", "--seeds", "1-18446744073709551616"], "seed is 18446744073709551616"),
    (["a fox", "--seeds", "18446744073709551616"], "seed is 18446744073709551616"),
    (["a fox", "--seeds", "1-"], "must be like 1-20"),
    (["a fox", "--seeds", ""], "must be like 1-20"),
    (["a fox", "--seeds", "1,,2"], "must be like 1-20"),
    (["a fox", "--seeds", "٣"], "must be like 1-20"),
    (["a fox", "--seeds", "9" * 10_000], "must be like 1-20"),
    (["a fox", "--seeds", "1-2", "--seed", "3"], "--seed or --seeds"),
    (["a fox", "--seeds", "1-2", "--image", "x.png"], "--image applies to one image"),
    (["--prompts-file", "p.txt", "--from-image", "x.png"], "--from-image applies to one image"),
    (["--prompts-file", "p.txt", "--mask-padding", "3"], "--mask-padding applies to one image"),
    (["--prompts-file", "p.txt", "--width", "60", "--height", "64"], "error: width is 60"),
    (["--prompts-file", "p.txt", "--num-images", "0"], "error: num_images is 0"),
    (["--prompts-file", "p.txt", "-o", "x.png"], "need a folder"),
    (["--prompts-file", "p.txt", "-o", "p.txt"], "need a folder"),
    (["--prompts-file", "p.txt", "-o", "p.txt/deeper"], "cannot write"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_loaded(run, flags, says, stages):
    Path("p.txt").write_text("a fox\n")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("folder.txt").mkdir()
    os.mkfifo("pipe.txt")
    os.symlink("/dev/zero", "zero.txt")
    before = sorted(os.listdir())
    assert says in error_line(run(*flags, model="./none"))
    assert (stages, sorted(os.listdir())) == ([], before)


def test_a_file_too_large_for_prompts_is_not_read(run, monkeypatch):
    monkeypatch.setattr("qwen_image_mlx.cli.batch._MAX_BYTES", 10)
    Path("p.txt").write_text("a long prompt\n")
    assert "too much for prompts" in error_line(run("--prompts-file", "p.txt", model="./none"))


def test_seeds_are_in_order_and_each_once():
    assert _seeds("7, 1-3,2 ,9-9") == [7, 1, 2, 3, 9]


def test_a_model_that_edits_is_refused(run):
    assert re.search("not a model to generate", error_line(run("a fox", "--seeds", "1-2", model="demo-edit")))
