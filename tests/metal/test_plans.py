"""Memory plans for Macs, from configs and a faked GPU: never below the model of Metal, and what fits which machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from metal_backend import work as traced
from metal_backend.machine import Machine
from metal_backend.replay import replay

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.pipeline.autoencode import strips_of
from qwen_image_mlx.pipeline.limits import usable_memory
from qwen_image_mlx.runtime import memory, memory_plan
from qwen_image_mlx.runtime.memory import Memory, fitting_plan
from qwen_image_mlx.runtime.memory_plan import Work, make_plan
from qwen_image_mlx.runtime.residency import DEFAULT, RESIDENCIES
from qwen_image_mlx.weights.synthetic import FULL, write_configs

GB = 10**9
DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"
# GiB of a Mac's memory, and GB that Metal recommends as a working set.
MACS = {8: 5.73, 16: 11.45, 18: 13.36, 24: 17.18, 32: 22.9, 36: 28.99, 48: 38.65, 64: 51.54, 96: 77.31, 128: 103.08}
TEXT = Work(width=1328, height=1328, steps=50)
EDIT = Work(width=1024, height=1024, steps=40, shown=((1024, 1024),), encoded=1024 * 1024)
LAYERS = Work(width=640, height=640, frames=5, shown=((640, 640),), encoded=640 * 640, captioned=640 * 640)


@pytest.fixture(autouse=True)
def on_metal(monkeypatch):
    monkeypatch.setattr(memory_plan, "backend", lambda: "gpu")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Components of a released model by configs alone, quantized in their files as said."""

    @cache
    def get(pipeline, bits=None):
        folder = tmp_path_factory.mktemp("configs")
        write_configs(folder, FULL, pipeline=pipeline)
        return QwenImagePipeline.from_pretrained(folder, quantize=bits).components

    return get


@cache
def modelled(graph, *arguments):
    """The most bytes beside the weights, on base and Pro chips and on Max and Ultra ones."""
    made = getattr(traced, graph)(*arguments)
    return max(replay(made, Machine(ops=count, elements=count << 20)).peak for count in (40, 50))


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("residency", RESIDENCIES, ids=lambda residency: residency.name)
@pytest.mark.parametrize(
    ("side", "guided"),
    [(512, True), (640, True), (704, True), (768, True), (1024, False), (1024, True), (1328, True), (2048, True)],
)
def test_a_plan_covers_the_model_of_metal(opened, residency, side, guided):
    components = opened("QwenImagePipeline")
    planned = Work(width=side, height=side, guided=guided, text_tokens=200)
    plan = make_plan(components, planned, residency)
    encode, _, denoise, decode = plan.stages
    tokens, texts = side * side // 256, (200, 20) if guided else (200,)
    streamed = memory_plan.Planner(components, planned, residency).passing
    for stage, peak in (
        (encode, modelled("language", texts) + streamed("text_encoder")),
        (denoise, modelled("forward", tokens, texts) + streamed("transformer")),
        (decode, modelled("decode", side, side, strips_of(side * side, plan.strip_pixels))),
    ):
        assert stage.resident + peak <= stage.peak <= 1.25 * (stage.resident + peak), stage.name


@pytest.mark.parametrize("references", [1, 2, 3])
def test_an_edit_s_plan_covers_the_model_of_metal(opened, references):
    components = opened("QwenImageEditPlusPipeline")
    shown = ((1024, 1024),) * references
    work = Work(width=1024, height=1024, shown=shown, encoded=1024 * 1024, steps=40)
    encode, _, denoise, _ = make_plan(components, work).stages
    text = memory_plan.Planner(components, work, DEFAULT).prompt_tokens
    peak = modelled("forward", 4096, (text, text - 60), 4096 * references)
    assert denoise.resident + peak <= denoise.peak <= 1.25 * (denoise.resident + peak)
    assert encode.resident + modelled("encode", 1024, 1024) <= encode.peak


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024, 1328, 2048])
def test_one_strip_is_planned_as_the_model_says(opened, side):
    plan = make_plan(opened("QwenImagePipeline"), Work(width=side, height=side), strip_pixels=side * side)
    decode = plan.stages[-1]
    peak = modelled("decode", side, side, 1)
    assert decode.resident + peak <= decode.peak <= 1.25 * (decode.resident + peak)


@pytest.fixture
def mac(monkeypatch):
    def become(gib):
        info = {"memory_size": gib << 30, "max_recommended_working_set_size": int(MACS[gib] * GB)}
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda device=None: info if device == mx.gpu else {})
        return usable_memory()

    return become


MODELS = {
    "text to image, 1328x1328": ("QwenImagePipeline", TEXT),
    "edit, 1024x1024, one reference": ("QwenImageEditPlusPipeline", EDIT),
    "four layers, 640x640": ("QwenImageLayeredPipeline", LAYERS),
}
QUANTIZATIONS = (None, "8", "4")
# By Mac: what is chosen for bf16, 8 and 4 bits. A quantized model is streamed once it was saved so.
CHOSEN = {
    8: ("streamed", "streamed", "streamed"),
    16: ("streamed", "streamed", "staged"),
    18: ("streamed", "streamed", "staged"),
    24: ("streamed", "streamed", "staged"),
    32: ("streamed", "staged", "resident"),
    36: ("streamed", "resident", "resident"),
    48: ("staged", "resident", "resident"),
    64: ("resident", "resident", "resident"),
    96: ("resident", "resident", "resident"),
    128: ("resident", "resident", "resident"),
}


def plan_on(components, work, budget):
    """What fits first; of quantized models also what has to be saved first, as their packs would be planned."""
    planners = [memory_plan.Planner(components, work, residency) for residency in RESIDENCIES]
    return memory._first_that_fits(planners, budget)


@pytest.mark.slow
@pytest.mark.parametrize("gib", MACS)
def test_what_fits_a_mac(opened, mac, gib):
    budget = mac(gib)
    for bits, name in zip(QUANTIZATIONS, CHOSEN[gib], strict=True):
        components = opened("QwenImagePipeline", bits)
        plan = plan_on(components, TEXT, budget)
        assert plan.peak <= budget, bits
        assert plan.residency.name == name, bits
        chosen = fitting_plan(components, TEXT, Memory(budget, RESIDENCIES))
        assert (chosen == plan) == (not plan.needs_pack), bits
        assert chosen.fits(budget) == (not plan.needs_pack), bits


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("gib", MACS)
@pytest.mark.parametrize("title", MODELS)
def test_everything_fits_every_mac(opened, mac, title, gib):
    budget, (pipeline, work) = mac(gib), MODELS[title]
    assert all(plan_on(opened(pipeline, bits), work, budget).peak <= budget for bits in QUANTIZATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("gib", MACS)
def test_the_documented_table_follows_from_the_plans(opened, mac, gib):
    budget = mac(gib)
    cells = []
    for bits in QUANTIZATIONS:
        plan = plan_on(opened("QwenImagePipeline", bits), TEXT, budget)
        cells.append(f"{plan.residency.name} {plan.peak / GB:.1f}{' (saved)' if plan.needs_pack else ''}")
    row = f"| {gib} GB | {budget / GB:.1f} | {' | '.join(cells)} |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), row


def test_whole_images_are_decoded_at_once_where_memory_allows(opened, mac):
    work = Work(width=1536, height=1536)
    for gib, whole in ((8, False), (64, True)):
        plan = plan_on(opened("QwenImagePipeline", "4"), work, mac(gib))
        assert (plan.strip_pixels == 1536 * 1536) == whole
