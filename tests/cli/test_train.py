"""The command that trains: what it writes, one line for every fault, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_edit
from commands import error_line, heeding
from PIL import Image

from qwen_image_mlx.cli.main import main

TINY_RUN = ["--rank", "4", "--resolution", "64", "--dtype", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for n in range(3):
        coarse = np.random.default_rng(n).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((96, 96)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"fox {n}")
    return folder


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory):
    return write_edit(tmp_path_factory.mktemp("edit") / "model", "edit_plus")


@pytest.fixture
def run(tmp_path, monkeypatch, tiny, capsys, data):
    """Runs the command in this process: (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=tiny, data=data, steps=2, output="run"):
        given = ["train", "--model", model, "--data", data, "--steps", steps, "--output", output, *TINY_RUN]
        code = main([str(a) for a in (*given, *arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def steps_of(folder="run"):
    return [json.loads(line)["step"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_its_lora_log_plot_samples_and_checkpoints(run):
    code, out, err = run(
        "--sample-every", 2, "--sample-prompt", "a fox", "--sample-prompt", "a hare", "--batch-size", 2,
        "--accumulate", 2, "--warmup", 1, "--schedule", "cosine", "--timesteps", "logit_normal", "--logit-mean", 0.5,
        "--weighting", "cosmap", "--shift", 2, "--caption-dropout", 0.1, "--targets", "to_q,to_v", "--alpha", 2,
        "--learning-rate", 1e-3, "--checkpointing", "--save-every", 1, "--seed", 7, "--task", "t2i",
    )  # fmt: skip
    assert (code, out) == (0, ["run/lora.safetensors"])
    assert "a LoRA of rank 4 for 4 matrices" in err
    assert "loss " in err.splitlines()[-1]
    assert {path.name for path in Path("run").iterdir()} == {
        "lora.safetensors", "lora-000001.safetensors", "lora-000002.safetensors", "log.jsonl", "plot.png", "samples",
        "checkpoints", "cache",
    }  # fmt: skip
    assert steps_of() == [1, 2]
    assert Image.open("run/samples/step-000002.png").size == (2 * 64 + 8, 64)


@pytest.mark.slow
def test_the_result_generates_and_says_how_it_was_trained(run, capsys, tiny):
    run()
    code = main(["generate", "a fox", "--model", str(tiny), "--lora", "run/lora.safetensors", "--width", "64",
                 "--height", "48", "--steps", "2", "--dtype", "float32"])  # fmt: skip
    assert code == 0
    capsys.readouterr()
    assert main(["lora", "inspect", "run/lora.safetensors", "--model", str(tiny)]) == 0
    said = capsys.readouterr().out
    assert "14" in said
    assert "4" in said


@pytest.mark.slow
def test_full_training_leaves_a_model(run, capsys):
    code, out, _ = run("--full", "--ema", "0.5", "--learning-rate", "1e-3")
    assert (code, out) == (0, ["run/model"])
    code = main(["generate", "a fox", "--model", "run/model", "--width", "64", "--height", "48", "--steps", "2"])
    assert (code, capsys.readouterr().out.splitlines()) == (0, ["qwen-image.png"])


@pytest.mark.slow
def test_resume_goes_on(run):
    run()
    assert "is not empty" in error_line(run())
    assert "rank 4 and not 8" in error_line(run("--resume", "--rank", 8))
    assert run("--resume", steps=4)[:2] == (0, ["run/lora.safetensors"])
    assert steps_of() == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_damaged_log_is_passed_over_where_it_is_damaged(run):
    run()
    log = Path("run/log.jsonl")
    lines = log.read_bytes().split(b"\n")
    odd = [b"\xff\xfe", b'{"step": 1e400, "loss": 1}', b'{"step": 1, "loss": 1e400}', b"[" * 100_000, b"[]", b'{"st']
    log.write_bytes(b"\n".join([lines[0], *odd, lines[1], b""]))
    assert run("--resume", steps=3)[0] == 0
    assert steps_of() == [1, 2, 3]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--steps", "0"], "steps is 0, but must be a whole number of at least 1"),
    (["--rank", "-1"], "rank is -1"),
    (["--steps", "9" * 20], "steps is 9+, but at most 10,000,000 work"),
    (["--accumulate", "9" * 20], "accumulate is 9+, but at most 10,000 work"),
    (["--batch-size", "10001"], "batch size is 10001, but at most 10,000 work"),
    (["--sample-every", "1", "--sample-prompt", "\udc80"], r"the sample prompt '\\udc80' is not valid text"),
    (["--rank", "5000"], "rank is 5000, but must be from 1 to 96, the size of transformer_blocks"),
    (["--learning-rate", "nan"], "learning rate is nan"),
    (["--resolution", "100"], "resolution is 100, but must be a multiple of 16"),
    (["--caption-dropout", "2"], "caption dropout is 2"),
    (["--schedule", "step"], "invalid choice: 'step'"),
    (["--targets", "to_q,norm_q"], "targets name 'norm_q', but must be attention, all or some of: "),
    (["--targets", "to_q,"], "targets name ''"),
    (["--ema", "0.9"], "give --full"),
    (["--sample-prompt", "x"], "--sample-prompt needs --sample-every"),
    (["--resume"], "holds no run to resume"),
    (["--task", "edit"], r"has no metadata\.jsonl; training edit needs one"),
    (["--full", "--quantize", "4"], "quantized weights cannot be trained"),
    (["--data", "/none"], "do not exist"),
    (["--data", "/dev/null"], "neither a folder nor a file"),
    (["--data", "~nosuchuser/x"], "--data is '~nosuchuser/x', which leads nowhere"),
    (["--data", "a" * 5000], "which leads nowhere: file name too long"),
    (["--data", ""], "--data is empty"),
    (["--output", "/dev/null/run"], "error: "),
    (["--output", "~nosuchuser/run"], "--output is '~nosuchuser/run', which leads nowhere"),
    (["--output", ""], "--output is empty"),
    (["--model", "/none"], "error: "),
], ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "")  # fmt: skip
def test_every_fault_is_one_line(run, arguments, said):
    line = error_line(run(*arguments))
    assert re.search(said, line), line
    assert not Path("run").exists(), "found before any work"


@pytest.mark.slow
def test_a_model_of_another_task_is_refused(run, edit_model, tmp_path, data):
    assert "is trained for edit, not for t2i" in error_line(run("--task", "t2i", model=edit_model))
    assert "training edit needs one" in error_line(run(model=edit_model))


def test_faults_of_data_are_one_line(run, tmp_path, data):
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "holds nothing to train on" in error_line(run(data=broken))
    (broken / "a.png").write_bytes((data / "0.png").read_bytes()[:60])
    assert "1 of 1 images in" in error_line(run(data=broken))
    (broken / "a.txt").write_text("a fox")
    assert "a.png cannot be read as an image" in error_line(run(data=broken))
    Image.new("RGB", (20, 20)).save(broken / "a.png")
    assert "1 of 1 images are smaller than the 64x64 pixels" in error_line(run(data=broken))


def test_a_loss_that_is_no_number_is_one_line(run):
    line = error_line(run("--learning-rate", 1e30, "--save-every", 1, steps=30))
    assert "last good checkpoint is run/checkpoints/step-" in line


@pytest.mark.process
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_ended_saves_and_a_second_run_goes_on(tmp_path, tiny, data, sent, code):
    command = [sys.executable, "-m", "qwen_image_mlx", "train", "--model", tiny, "--data", data, "--output", "run"]
    command = [*map(str, command), *TINY_RUN, "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, preexec_fn=heeding(sent))  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3) and time.monotonic() < until:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    done = len(steps_of(tmp_path / "run"))
    if sent != signal.SIGHUP:
        assert "finishing this step, then saving" in err
        assert f"stopped after {done} steps, saved as run/checkpoints/step-{done:06}.safetensors" in err
    assert (tmp_path / f"run/checkpoints/step-{done:06}.safetensors").is_file()
    again = [*command, "--resume", "--steps", str(done + 2)]
    finished = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout) == (0, "run/lora.safetensors\n"), finished.stderr
    assert steps_of(tmp_path / "run") == [*range(1, done + 3)]


def test_ctrl_c_before_training_stops_at_once(run, monkeypatch):
    import qwen_image_mlx.training.run as module

    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, "encode_examples", interrupt)
    code, out, err = run()
    assert (code, out, err.splitlines()[-1]) == (130, [], "interrupted")
    assert signal.getsignal(signal.SIGINT) is before
