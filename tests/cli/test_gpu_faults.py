"""A GPU that fails at any stage of any command: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import error_line
from gpu_texts import BUSY, FAULTS, MEMORY, REFUSED, TIMEOUT, FailingGPU

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import main

pytestmark = pytest.mark.process

GENERATE = ("generate", "a red circle on a blue background", "--model", "demo", "--steps", "2")
EDIT = ("edit", "make the circle green", "--image", "circle.png", "--model", "demo-edit", "--steps", "2")
DECOMPOSE = ("decompose", "circle.png", "--model", "demo-layered", "--layers", "2", "--prompt", "x", "--steps", "2")
TRAIN = ("train", "--model", "demo", "--data", "data", "--output", "run", "--steps", "2", "--resolution", "64")
ADVICE = {told.text: told.advice for told in FAULTS}


@pytest.fixture(scope="module")
def circle():
    (image,) = QwenImagePipeline.from_pretrained("demo").generate("a red circle", width=64, height=64, seed=1)
    return image


@pytest.fixture
def run(here, circle, capsys):
    """Runs a command next to an image and a folder to train with: (exit code, lines of stdout, stderr)."""
    circle.save("circle.png")
    Path("data").mkdir()
    circle.save("data/circle.png")
    Path("data/circle.txt").write_text("a red circle")

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.mark.parametrize(("command", "place", "text"), [
    (GENERATE, "weights/loader.py", MEMORY),
    (GENERATE, "pipeline/qwen_image/states.py", TIMEOUT),
    (GENERATE, "pipeline/qwen_image/table.py", BUSY),
    (GENERATE, "sampling/denoise.py", REFUSED),
    (GENERATE, "pipeline/autoencode.py", MEMORY),
    ((*GENERATE, "--memory", "streamed"), "weights/streaming.py", TIMEOUT),
    ((*GENERATE, "--quantize", "8"), "weights/quantize.py", TIMEOUT),
    (EDIT, "pipeline/qwen_image/states.py", BUSY),
    (EDIT, "pipeline/autoencode.py", MEMORY),
    (DECOMPOSE, "sampling/denoise.py", TIMEOUT),
    (DECOMPOSE, "pipeline/autoencode.py", REFUSED),
    (("quantize", "demo", "packed", "--bits", "8"), "", TIMEOUT),
    (TRAIN, "training/dataset.py", MEMORY),
    (TRAIN, "training/table.py:__call__", MEMORY),
    (TRAIN, "training/loop.py", MEMORY),
], ids=lambda value: value[0] if isinstance(value, tuple) else Path(value).name.split(" (")[0])  # fmt: skip
def test_a_fault_is_one_sentence_with_advice(run, monkeypatch, command, place, text):
    before = sorted(Path().rglob("*.png"))
    gpu = FailingGPU(monkeypatch, text, place)
    line = error_line(run(*command))
    assert gpu.failed >= 1, "the stage was reached"
    assert all(words in line for words in ADVICE[text]), line
    assert text.rstrip(".") in line
    assert "file" not in line.partition("(")[0], "no file is to blame"
    assert sorted(Path().rglob("*.png")) == before


@pytest.mark.parametrize(("command", "place"), [
    (GENERATE, "pipeline/qwen_image/states.py"), (GENERATE, "pipeline/autoencode.py"),
    (EDIT, "pipeline/autoencode.py"),
])  # fmt: skip
def test_a_fault_that_evaluating_did_not_raise_is_met_before_the_result_is_used(run, monkeypatch, command, place):
    gpu = FailingGPU(monkeypatch, MEMORY, place, functions=("synchronize",))
    assert "--memory" in error_line(run(*command))
    assert gpu.failed == 1


@pytest.mark.parametrize("place", ["training/checkpoints.py:load_checkpoint", "training/loop.py:restore"])
def test_a_checkpoint_is_not_blamed(run, monkeypatch, place):
    assert run(*TRAIN, "--save-every", "1")[0] == 0
    gpu = FailingGPU(monkeypatch, MEMORY, place)
    line = error_line(run(*TRAIN[:-4], "--steps", "3", *TRAIN[-2:], "--save-every", "1", "--resume"))
    assert gpu.failed == 1
    assert "--memory" in line
    assert "safetensors" not in line


def test_a_caption_meets_it_too(run, monkeypatch, tmp_path_factory):
    from checkpoints import write_layered

    model = write_layered(tmp_path_factory.mktemp("captions") / "layered")
    gpu = FailingGPU(monkeypatch, REFUSED)
    assert "start the program again" in error_line(run("caption", "circle.png", "--model", model))
    assert gpu.failed


def test_the_same_command_works_when_the_gpu_does_again(run, monkeypatch, circle):
    with monkeypatch.context() as patch:
        FailingGPU(patch, MEMORY, "sampling/denoise.py")
        error_line(run(*GENERATE))
    assert run(*GENERATE)[:2] == (0, ["qwen-image.png"])


def test_an_error_of_the_program_keeps_its_traceback(run, monkeypatch):
    FailingGPU(monkeypatch, "There is no Stream(cpu, 3) in current thread.", "sampling/denoise.py")
    with pytest.raises(RuntimeError, match="no Stream"):
        run(*GENERATE)
