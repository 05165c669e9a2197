"""Faults of the GPU, told by MLX's words and never blamed on anything else."""

from __future__ import annotations

import mlx.core as mx
import pytest
from gpu_texts import FAULTS, MEMORY, REFUSED, TIMEOUT, FailingGPU

from qwen_image_mlx import GPUError, QwenImagePipeline
from qwen_image_mlx.errors import CheckpointError, OutputError
from qwen_image_mlx.gpu import finish, gpu_error, gpu_faults
from qwen_image_mlx.lora import file as lora
from qwen_image_mlx.pipeline.conditioning import GuidanceEncoding
from qwen_image_mlx.weights.safetensors_files import read_header, save_tensors
from qwen_image_mlx.weights.tensor_formats import reading


@pytest.mark.parametrize("told", FAULTS, ids=[told.text[:60] for told in FAULTS])
def test_a_fault_is_told_by_its_text(told):
    found = gpu_error(RuntimeError(told.text))
    assert isinstance(found, GPUError)
    assert (found.fault, found.fatal) == (told.fault, told.fatal)
    message = str(found)
    assert all(words in message for words in told.advice), message
    assert " ".join(told.text.split()).rstrip(".") in message, "MLX's own words can be searched for"
    assert "\n" not in message
    assert len(message) <= 400, "the server cuts longer ones"


@pytest.mark.parametrize("error", [
    RuntimeError("[load_safetensors] Failed to open file [METAL].safetensors"),
    RuntimeError("[read] Unable to read 4096 bytes from file."),
    RuntimeError("[matmul] Last dimension of first input with shape (1,2) must match second to last dimension"),
    RuntimeError("There is no Stream(cpu, 3) in current thread."),
    RuntimeError("cumsum failed"),
    RuntimeError(""),
    ValueError(MEMORY),
    MemoryError(MEMORY),
    CheckpointError(MEMORY),
], ids=lambda error: f"{type(error).__name__} {str(error)[:30]}")  # fmt: skip
def test_other_errors_are_no_faults_of_the_gpu(error):
    assert gpu_error(error) is None
    with pytest.raises(type(error)) as raised, gpu_faults():
        raise error
    assert raised.value is error


def test_paths_and_long_texts_are_cut():
    message = str(gpu_error(RuntimeError(f"Failed to load the metallib from </Users/me/mlx.metallib>. {'x' * 500}")))
    assert "/Users" not in message
    assert message.endswith("x…)")
    assert len(message) <= 400


def test_a_gpu_error_gives_one_like_it_without_its_traceback():
    with pytest.raises(GPUError) as raised, gpu_faults():
        raise RuntimeError(REFUSED)
    again = gpu_error(raised.value)
    assert (str(again), again.fault, again.fatal) == (str(raised.value), "refused", True)
    assert raised.value.__traceback__ is not None
    assert again.__traceback__ is again.__cause__ is again.__context__ is None


def test_faults_become_gpu_errors_in_a_block_a_function_and_a_generator():
    with pytest.raises(GPUError) as raised, gpu_faults():
        raise RuntimeError(TIMEOUT)
    assert str(raised.value.__cause__) == TIMEOUT

    @gpu_faults()
    def function(number: int) -> int:
        if number < 0:
            raise RuntimeError(TIMEOUT)
        return number

    @gpu_faults()
    def generator(last: int):
        for number in range(last):
            if (yield number) == "stop":
                return "stopped"
        raise RuntimeError(TIMEOUT)

    assert function(3) == 3
    assert function.__name__ == "function"
    with pytest.raises(GPUError):
        function(-1)
    numbers = generator(2)
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(GPUError):
        next(numbers)
    numbers = generator(2)
    next(numbers)
    with pytest.raises(StopIteration, match="stopped"):
        numbers.send("stop")


def test_finishing_evaluates_and_then_waits_for_the_gpu(monkeypatch):
    order = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: order.append(("eval", arrays)))
    monkeypatch.setattr(mx, "synchronize", lambda: order.append(("synchronize", ())))
    finish("a", ["b"])
    assert order == [("eval", ("a", ["b"])), ("synchronize", ())]


@pytest.mark.parametrize("function", ["eval", "synchronize"])
def test_what_finishing_meets_is_a_fault(monkeypatch, function):
    gpu = FailingGPU(monkeypatch, MEMORY, functions=(function,))
    with pytest.raises(GPUError, match="Insufficient Memory"), gpu_faults():
        finish(mx.array(1))
    assert gpu.failed == 1


def test_no_file_is_blamed(monkeypatch, tmp_path):
    encoding = QwenImagePipeline.from_pretrained("demo").encode_guidance_prompts("a circle")
    encoding.save(tmp_path / "encoding.safetensors")

    def not_now(*arguments, **named):
        raise RuntimeError(MEMORY)

    path = tmp_path / "lora.safetensors"
    mx.save_safetensors(str(path), {"x": mx.array([1.0])})
    tensor = read_header(path)[0]["x"]
    assert lora.Arrays(path).take(tensor).tolist() == [1]

    for broken, expected in ((MEMORY, GPUError), ("[read] Unable to read 8 bytes from file.", CheckpointError)):
        with pytest.raises(expected), reading("vae"):
            raise RuntimeError(broken)
    FailingGPU(monkeypatch, MEMORY)
    with pytest.raises(GPUError):
        GuidanceEncoding.load(tmp_path / "encoding.safetensors")
    with pytest.raises(GPUError):
        lora.Arrays(path).take(tensor)
    monkeypatch.setattr(mx, "save_safetensors", not_now)
    with pytest.raises(GPUError):
        save_tensors(tmp_path / "new.safetensors", {"x": mx.array(1)}, {})
    monkeypatch.undo()
    with pytest.raises(OutputError):
        save_tensors(tmp_path / "no" / "new.safetensors", {"x": mx.array(1)}, {})
    assert {file.name for file in tmp_path.iterdir()} == {"encoding.safetensors", "lora.safetensors"}
