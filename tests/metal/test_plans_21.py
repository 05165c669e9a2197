"""Memory plans of Qwen-Image-2.1 for Macs: never below the model of Metal, little above it, and what fits which Mac."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from metal_backend import work_21 as traced
from metal_backend.machine import Machine
from metal_backend.replay import replay

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline.autoencode import strips_of
from qwen_image_mlx.pipeline.limits import usable_memory
from qwen_image_mlx.runtime import memory, memory_plan
from qwen_image_mlx.runtime.memory_plan import Planner, Work, make_plan
from qwen_image_mlx.runtime.residency import DEFAULT, RESIDENCIES
from qwen_image_mlx.weights.synthetic import released, write_configs

GB = 10**9
PIPELINE = "QwenImage21Pipeline"
DOCUMENT = Path(__file__).parents[2] / "docs" / "qwen-image-2.1.md"
MACS = {16: 11.45, 24: 17.18, 32: 22.9, 64: 51.54}  # GiB of memory, and GB that Metal recommends as a working set
QUANTIZATIONS = (None, "8", "4")
EDIT = Work(1024, 1024, steps=40, guided=False, shown=((1024, 1024),), encoded=1024**2)
TEN = replace(EDIT, shown=EDIT.shown * 10)
WORKS = {
    "image of 2048x2048": Work(2048, 2048, steps=40, guided=False),
    "edit of 1024x1024, one reference": EDIT,
    "ten references": TEN,
    "ten references, `--no-prefix-cache`": replace(TEN, keeps_prefix=False),
    "ten references, `--reference-pixels 262144`": replace(TEN, shown=((512, 512),) * 10, encoded=512**2),
}
STREAMED = RESIDENCIES[-1]


@pytest.fixture(autouse=True)
def on_metal(monkeypatch):
    monkeypatch.setattr(memory_plan, "backend", lambda: "gpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_configs(folder, released(PIPELINE), pipeline=PIPELINE)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    return cache(lambda bits=None: QwenImagePipeline.from_pretrained(folder, quantize=bits).components)


def modelled(graph, *arguments, **more):
    """The most bytes in addition to the weights, on base and Pro chips and on Max and Ultra ones."""
    made = getattr(traced, graph)(*arguments, **more)
    return max(replay(made, Machine(ops=count, elements=count << 20)).peak for count in (40, 50))


CASES = [
    *((side, guided, 0) for side in (512, 704, 1024, 1536, 2048) for guided in (False, True)),
    *((1024, guided, count) for guided in (False, True) for count in (1, 2, 4)),
    (512, False, 4),
    (1024, False, 10),
]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize(("side", "guided", "references"), CASES)
def test_a_step_s_plan_covers_the_model_of_metal(opened, side, guided, references, keep):
    blocks, whole = 6, 32
    texts = (200, 140) if guided else (200,)
    shown = ((1024, 1024),) * references
    work = Work(side, side, shown=shown, guided=guided, text_tokens=200, steps=40, keeps_prefix=keep)
    for residency in (DEFAULT, STREAMED):
        planner = Planner(opened(), work, residency)
        denoise = planner.before_decode[1][2]
        peak = modelled("forward", (side // 16, side // 16), texts, ((64, 64),) * references, blocks, keep=keep)
        if keep:  # the trace keeps those of its own blocks
            tokens = sum(text + 4096 * references for text in texts)
            peak += 2 * (whole - blocks) * 4096 * 2 * tokens
        # `resident` counts what is kept, and so does the trace.
        weights = denoise.resident - planner.table() + planner.passing("transformer")
        assert weights + peak <= denoise.peak <= 1.25 * (weights + peak), residency.name


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024, 1536])
@pytest.mark.parametrize("in_strips", [True, False])
def test_a_decoding_s_plan_covers_the_model_of_metal(opened, side, in_strips):
    strip = memory_plan.STRIP_PIXELS if in_strips else side * side
    decode = make_plan(opened(), Work(side, side), strip_pixels=strip).stages[-1]
    peak = modelled("decode", side, side, strips_of(side * side, strip))
    assert decode.resident + peak <= decode.peak <= 1.3 * (decode.resident + peak)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 4])
def test_an_encoding_s_plan_covers_the_model_of_metal(opened, count):
    """Prompts, images through the vision tower and through the autoencoder; all of the encoders' weights are there."""
    work = Work(1024, 1024, shown=((1024, 1024),) * count, encoded=1024**2 * bool(count), text_tokens=200, guided=True)
    encode = make_plan(opened(), work).stages[0]
    tokens = 200 + 1024 * count
    peaks = [modelled("language", (tokens, tokens - 60))]
    if count:
        peaks += [modelled("encode", 1024, 1024)]
    assert encode.resident + max(peaks) <= encode.peak <= 1.25 * (encode.resident + max(peaks))


def test_places_of_references_are_not_counted_twice(opened):
    """An image stands in the stream by its latents alone; the text encoder sees a quarter as many places."""
    planner = Planner(opened(), TEN, DEFAULT)
    assert planner.prefix_tokens == 256 + 10 * 4096
    assert planner.prompt_tokens == 256 + 10 * 1024


@pytest.fixture
def mac(monkeypatch):
    def become(gib):
        info = {"memory_size": gib << 30, "max_recommended_working_set_size": int(MACS[gib] * GB)}
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda device=None: info if device == mx.gpu else {})
        return usable_memory()

    return become


@pytest.mark.parametrize("gib", MACS)
def test_the_documented_table_follows_from_the_plans(opened, mac, gib):
    budget, text = mac(gib), DOCUMENT.read_text(encoding="utf-8")
    for title, work in WORKS.items():
        cells = []
        for bits in QUANTIZATIONS:
            plan = memory._first_that_fits([Planner(opened(bits), work, r) for r in RESIDENCIES], budget)
            cells.append(f"{plan.residency.name} {plan.peak / GB:.1f}{' (saved)' if plan.needs_pack else ''}")
            if plan.peak > budget:
                cells[-1] = f"no: {plan.peak / GB:.1f}"
        row = f"| {gib} GB, {title} | {budget / GB:.1f} | {' | '.join(cells)} |"
        assert row in text, row


@pytest.mark.slow
@pytest.mark.parametrize("gib", MACS)
def test_the_command_plans_it_from_configs_alone(folder, mac, gib, capsys):
    budget = mac(gib)
    assert main(["plan", str(folder), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["memory"], planned["width"]) == (budget, 2048)
    weights = {plan["residency"]: plan["stages"]["denoise"]["resident"] for plan in planned["plans"]}
    assert 14.0e9 < weights["staged"] < 14.5e9
    fits = [plan["residency"] for plan in planned["plans"] if plan["fits"]]
    assert fits[0] == {16: "streamed", 24: "streamed", 32: "staged", 64: "resident"}[gib]
