"""Memory plans: weights to the byte, the first residency that fits, and the same pixels from every one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from qwen_image_mlx import QwenImagePipeline, RequestError
from qwen_image_mlx.cli.hints import HINTS
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline.limits import limits
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.pipeline.qwen_image.costs import COSTS
from qwen_image_mlx.pipeline.qwen_image.denoiser import QwenImageDenoiser
from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
from qwen_image_mlx.runtime import memory
from qwen_image_mlx.runtime.memory import Memory, fitting_plan, parse_memory
from qwen_image_mlx.runtime.memory_plan import STRIPS, Work, make_plan
from qwen_image_mlx.runtime.residency import DEFAULT, RESIDENCIES
from qwen_image_mlx.weights.schemes import Quantization
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

WORK = Work(64, 48, steps=2)
# Wide enough for weights to count.
CONFIGS = {
    **TINY,
    "transformer": replace(TINY["transformer"], num_layers=8, num_attention_heads=6),
    "text_encoder": replace(TINY["text_encoder"], num_hidden_layers=8, vocab_size=200_000),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plans") / "model", CONFIGS, dtype=mx.float32)


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    return quantize_checkpoint(model, tmp_path_factory.mktemp("plans") / "packed", Quantization.parse("4/32"))


@pytest.fixture(autouse=True)
def small_base(monkeypatch):
    """What any work takes is tens of MB, which would hide the rest of a tiny model."""
    costs = {name: replace(cost, base=0) for name, cost in COSTS.items()}
    monkeypatch.setattr(QwenImageDenoiser, "costs", costs)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, command="generate"):
        usual = ["a fox", "--model", model, "--dtype", "float32", "--width", "64", "--height", "48", "--steps", "2",
                 "--seed", "1"] if command == "generate" else []  # fmt: skip
        code = main([command, *map(str, usual), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def nbytes(*modules):
    return sum(array.nbytes for module in modules for _, array in tree_flatten(module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "4/32"])
@pytest.mark.parametrize("residency", RESIDENCIES, ids=lambda residency: residency.name)
def test_weights_are_counted_to_the_byte(model, packed, residency, quantize):
    if quantize and residency.streamed:
        model, quantize = packed, None  # what is streamed is used as it lies in its files
    pipeline = QwenImagePipeline.from_pretrained(model, dtype="float32", quantize=quantize, streamed=residency.streamed)
    components = pipeline.components
    encode, load, denoise, decode = make_plan(components, WORK, residency).stages
    encoders = nbytes(components.network("text_encoder"))
    assert encode.resident == encoders
    weights = components.weights("transformer")
    table = sum(
        array.nbytes
        for m in modulation_table(weights, [1.0, 0.5], pipeline.dtype)
        for _, array in tree_flatten([m.out, [b[:2] for b in m.blocks]])
    )
    kept = 0 if residency.staged else encoders
    assert load.resident == denoise.resident == kept + table + nbytes(components.network("transformer"))
    generated = kept if residency.staged else denoise.resident
    assert decode.resident == generated + nbytes(components.network("vae_decoder"))


def test_an_edit_counts_its_towers(tmp_path):
    folder = write_checkpoint(tmp_path / "edit", TINY, dtype=mx.float32, pipeline="QwenImageEditPlusPipeline")
    components = QwenImagePipeline.from_pretrained(folder, dtype="float32").components
    one, two = (make_plan(components, Work(64, 64, shown=((64, 64),) * n, encoded=64 * 64, steps=2)) for n in (1, 2))
    held = nbytes(components.network("text_encoder"), components.network("vision"), components.network("vae_encoder"))
    assert one.stages[0].resident == two.stages[0].resident == held
    assert two.stages[2].peak > one.stages[2].peak


@pytest.mark.slow
def test_the_first_that_fits_is_chosen(model):
    components = QwenImagePipeline.from_pretrained(model, dtype="float32").components
    plans = [make_plan(components, WORK, residency) for residency in RESIDENCIES]
    peaks = [plan.peak for plan in plans]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    for plan in plans:
        assert fitting_plan(components, WORK, Memory(plan.peak, RESIDENCIES)).residency == plan.residency
    least = min(make_plan(components, WORK, RESIDENCIES[-1], strip).peak for strip in STRIPS)
    assert fitting_plan(components, WORK, Memory(1, RESIDENCIES)).peak == least


@pytest.mark.slow
def test_large_images_are_decoded_in_smaller_strips_where_memory_is_short(model, monkeypatch):
    costs = replace(COSTS["cpu"], scores=0.0, image=0.0, prompt=0.0)  # decoding is what takes most
    monkeypatch.setattr(QwenImageDenoiser, "costs", {"cpu": costs})
    components = QwenImagePipeline.from_pretrained(model, dtype="float32").components
    large = Work(512, 512, steps=2)
    wide = make_plan(components, large)
    plan = fitting_plan(components, large, Memory(wide.peak - 1, RESIDENCIES))
    assert plan.strip_pixels < wide.strip_pixels
    assert plan.peak < wide.peak


@pytest.mark.parametrize(("text", "nbytes"), [
    ("16GB", 16 * 10**9), ("16g", 16 * 10**9), ("12.5 GiB", 12.5 * 2**30), ("800MB", 8 * 10**8), ("16000000000", 16e9),
])  # fmt: skip
def test_memory_is_read_as_people_write_it(text, nbytes):
    assert parse_memory(text) == Memory(int(nbytes), RESIDENCIES)


def test_memory_may_be_the_machine_s_or_a_residency(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: 10**10)
    assert parse_memory("AUTO") == Memory(10**10, RESIDENCIES)
    assert parse_memory(None) == Memory(10**10, (DEFAULT,))
    assert parse_memory("streamed") == Memory(10**10, RESIDENCIES[-1:])


@pytest.mark.parametrize("text", ["", "much", "-16GB", "16TBs", "1e9", "nan", "16 GB please", "1KB", "0",
                                  "١٦GB", "1000001GB", "1" + "0" * 20, "9" * 309, "20000000000000GB"])  # fmt: skip
def test_impossible_memory_is_refused(text):
    with pytest.raises(RequestError, match="memory is"):
        parse_memory(text)


def limits_now():
    """MLX's (cache, memory) limits."""
    limits = mx.set_cache_limit(1 << 40), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(limits[0])
    mx.set_memory_limit(limits[1])
    return limits


def test_limits_are_as_they_were_afterwards():
    before = mx.set_cache_limit(900 << 20), mx.set_memory_limit(5 << 30)
    try:
        with limits(4 << 30):
            inside = limits_now()
            assert inside == (900 << 20, 4 << 30)
            with limits(8 << 30):
                assert limits_now() == inside, "those around a call are not loosened"
            with limits():
                assert limits_now() == inside, "and a call without wishes leaves them"
        assert limits_now() == (900 << 20, 5 << 30)
    finally:
        mx.set_cache_limit(before[0])
        mx.set_memory_limit(before[1])


@pytest.mark.slow
def test_pixels_do_not_depend_on_the_memory(model, run, monkeypatch):
    monkeypatch.setattr(memory, "MIN_MEMORY", 1)
    code, _, err = run("-o", "plain.png")
    assert code == 0, err
    components = QwenImagePipeline.from_pretrained(model, dtype="float32").components
    pixels = np.asarray(Image.open("plain.png"))
    work = replace(WORK, guided=True)
    for number, residency in enumerate(RESIDENCIES):
        budget = make_plan(components, work, residency).peak
        code, _, err = run("--memory", budget, "-o", f"{number}.png")
        assert code == 0, err
        assert f"{residency.name}: " in err
        assert run("--memory", residency.name, "-o", f"{number}-named.png")[0] == 0
        np.testing.assert_array_equal(np.asarray(Image.open(f"{number}-named.png")), pixels)
        np.testing.assert_array_equal(np.asarray(Image.open(f"{number}.png")), pixels)


@pytest.mark.slow
def test_a_quantized_model_is_streamed_only_once_it_is_saved(model, packed, run, monkeypatch):
    monkeypatch.setattr(memory, "MIN_MEMORY", 1)
    components = QwenImagePipeline.from_pretrained(packed, dtype="float32").components
    budget = make_plan(components, replace(WORK, guided=True), RESIDENCIES[-1]).peak
    for wanted in (budget, "streamed"):
        code, out, err = run("--memory", wanted, "--quantize", "4/32", "-o", "no.png")
        assert (code, out) == (2, "")
        assert err.rstrip().endswith(HINTS["streamed quantization"])
    assert "saved quantized" in err or wanted == "streamed"
    assert run("--model", packed, "--memory", budget, "-o", "yes.png")[0] == 0


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_table_and_generated_by_force(model, run, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MIN_MEMORY", 1)
    code, out, err = run("--memory", "2MB", "-o", "no.png")
    assert (code, out) == (2, "")
    assert [line for line in err.splitlines() if line.startswith("streamed")]
    assert "but only 0.00 may be used" in err
    assert not (tmp_path / "no.png").exists()
    code, out, err = run("--memory", "2MB", "--force", "-o", "yes.png")
    assert (code, out) == (0, "yes.png\n"), err
    monkeypatch.setattr(memory, "usable_memory", lambda: 2_000_000)
    code, _, err = run("-o", "no.png")
    assert code == 2
    assert "--memory auto" in err


@pytest.mark.slow
def test_a_profile_is_printed_and_recorded(run):
    code, _, err = run("--timings", "-o", "fox.png")
    assert code == 0, err
    assert "seconds" in err
    record = json.loads(Image.open("fox.png").text["qwen_image_mlx"])["profile"]
    assert [row["stage"] for row in record] == [
        "load tokenizer", "load text_encoder", "encode prompts", "load modulation", "load transformer", "denoise",
        "load vae_decoder", "decode",
    ]  # fmt: skip
    costs = {row["stage"]: row for row in record}
    assert costs["load text_encoder"]["resident"] > costs["load transformer"]["resident"] > 0
    assert all(row["peak"] >= row["resident"] and row["seconds"] >= 0 for row in record)
    assert costs["decode"]["resident"] < costs["denoise"]["resident"], "the transformer is gone before the decoder"


@pytest.mark.slow
def test_plan_prints_every_way_and_its_alternatives(model, run):
    code, out, err = run(model, "--memory", "1GB", "--size", "64x64", command="plan")
    assert code == 0, err
    for residency in RESIDENCIES:
        assert out.count(f"{residency.name} ") >= 4
    assert "with --quantize 4" in out
    code, out, _ = run(model, "--json", "--quantize", "8/32", "--size", "64x64", command="plan")
    facts = json.loads(out)
    assert [plan["needs_pack"] for plan in facts["plans"]] == [False, False, True, True]
    assert [plan["residency"] for plan in facts["plans"]] == [residency.name for residency in RESIDENCIES]
    files = sum(file.stat().st_size for file in model.glob("*/*.safetensors"))
    assert files * 0.9 < facts["disk"] < files, "all but the headers and what no image needs"


@pytest.mark.slow
def test_a_folder_of_configs_is_planned_like_the_checkpoint(model, tmp_path, run):
    whole = write_checkpoint(tmp_path / "whole", CONFIGS)
    shutil.copytree(whole, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    plans = []
    for folder in ("whole", "configs"):
        code, out, err = run(tmp_path / folder, "--json", "--size", "64x64", command="plan")
        assert code == 0, err
        plans.append(json.loads(out)["plans"])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(("arguments", "says"), [
    (["--memory", "lots"], "memory is 'lots'"),
    (["--steps", "0"], "--steps is 0, but must be from 1 to 1000"),
    (["--steps", "9" * 20], "but must be from 1 to 1000"),
    (["--size", ""], "--size is ''"),
    (["--size", f"{'9' * 5000}x64"], "--size is '999"),
    (["--size", "63x64"], "multiple of 16"),
    (["--size", "1mp"], "WIDTHxHEIGHT"),
    (["--references", "2"], "does not take"),
    (["--quantize", "9"], "not a quantization"),
    (["--layers", "0"], "from 1 to 8"),
    (["--group-size", "32"], "needs --quantize"),
])  # fmt: skip
def test_plans_of_nonsense_are_refused(model, run, arguments, says):
    code, out, err = run(model, *arguments, command="plan")
    assert (code, out) == (2, "")
    assert says in err


def test_a_plan_for_a_file_is_refused(tmp_path, run):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    code, _, err = run(tmp_path / "other.gguf", command="plan")
    assert code == 2
    assert "give the directory of a checkpoint" in err


def test_the_default_is_staged():
    assert DEFAULT.name == "staged"
