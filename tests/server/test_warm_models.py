"""Models in the worker's thread: a job keeps to its plan, whatever the one before left; faults tell of no file."""

from __future__ import annotations

import base64
import gc
import io
import shutil
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_layered
from checkpoints_21 import write_checkpoint_21
from PIL import Image
from served import serving

from qwen_image_mlx import variants
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.errors import Cancelled, HubError, RequestError
from qwen_image_mlx.pipeline import caption, conductor, generation
from qwen_image_mlx.runtime.memory_plan import make_plan
from qwen_image_mlx.runtime.session import Session
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.server.models import Models
from qwen_image_mlx.server.schema import CaptionBody, DecomposeBody, EditBody, GenerateBody
from qwen_image_mlx.server.tasks import Limits, Tasks
from qwen_image_mlx.weights.snapshot import HubSnapshot

pytestmark = pytest.mark.process

DEMOS = {"generate": "demo", "edit": "demo-edit", "decompose": "demo-layered"}
PARTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
HEAVY = {"text_encoder", "transformer"}


class Told:
    """A job's feed, which cancels at a step of denoising."""

    followed, images = False, 1

    def __init__(self, last: int | None = None):
        self.stages: list[str] = []
        self._last = last

    def __call__(self, progress) -> None:
        self.stages.append(f"{progress.stage} {progress.detail}".strip())
        if progress.stage == "denoise" and progress.step == self._last:
            raise Cancelled("cancelled")


def models_of(memory: str | None, **named: object) -> tuple[Models, Tasks]:
    offers = {task: {"model": named.get(task, model), "quantize": None, "loras": []} for task, model in DEMOS.items()}
    models = Models(offers, memory, None)
    return models, Tasks(models, {task: {} for task in offers}, Limits())


def parts_of(models: Models, task: str) -> set[str]:
    return set(models.open(task).pipeline.components.loaded)


def png(size: tuple[int, int] = (64, 64), colour: str = "blue", kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def encoding(monkeypatch) -> list[set[str]]:
    """What is loaded when prompts have just been encoded, each time."""
    seen: list[set[str]] = []
    encode = conductor.encode_request

    def watched(pipeline, *arguments, **more):
        encoded = encode(pipeline, *arguments, **more)
        seen.append(set(pipeline.components._loaded))
        return encoded

    monkeypatch.setattr(conductor, "encode_request", watched)
    return seen


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_a_cancelled_job_left_is_gone_when_the_next_encodes(encoding):
    models, tasks = models_of("staged")
    with pytest.raises(Cancelled):
        tasks.work("generate", GenerateBody(prompt="a", steps=3))(Told(last=2))
    assert "transformer" in parts_of(models, "generate")
    tasks.work("generate", GenerateBody(prompt="b", steps=1))(Told())
    assert [parts & HEAVY for parts in encoding] == [{"text_encoder"}] * 2


def test_an_image_that_is_staged_finds_no_rest_of_one_that_was_resident(encoding):
    models, tasks = models_of(None)
    tasks.work("generate", GenerateBody(prompt="a", steps=1))(Told())
    assert parts_of(models, "generate") >= HEAVY
    session = models._warm["generate"].session
    session.memory = models_of("staged")[0]._memory
    session.plans.clear()
    tasks.work("generate", GenerateBody(prompt="b", steps=1))(Told())
    assert encoding[-1] & HEAVY == {"text_encoder"}


@pytest.mark.parametrize("task", DEMOS)
def test_a_model_is_loaded_ahead_as_far_as_its_plan_keeps_it(task):
    for memory, stays in (("streamed", False), ("staged", False), (None, True)):
        models, tasks = models_of(memory)
        said = tasks.load(task)(Told())
        assert said == {"task": task, "model": DEMOS[task], "loaded": stays}
        assert (parts_of(models, task) >= HEAVY) == stays
        assert bool(parts_of(models, task)) == stays


def test_after_loading_ahead_nothing_is_loaded_for_a_job():
    _, tasks = models_of(None)
    body = {
        "generate": GenerateBody(prompt="x", steps=1),
        "edit": EditBody(prompt="x", image=png(), steps=1),
        "decompose": DecomposeBody(prompt="x", image=png(), steps=1),
    }
    for task in DEMOS:
        tasks.load(task)(Told())
        feed = Told()
        tasks.work(task, body[task])(feed)
        assert {stage for stage in feed.stages if stage.startswith("load")} <= {"load modulation"}, task


def test_a_model_makes_room_for_another_and_the_longest_unused_goes_first():
    models, tasks = models_of(None)
    for task in DEMOS:
        tasks.load(task)(Told())
    assert all(status["loaded"] for status in models.status())
    models.unload("edit")
    (plan,) = models._warm["edit"].session.plans.values()
    models._memory = replace(models._memory, budget=plan.peak + models._warm["decompose"].held)
    tasks.load("edit")(Told())
    assert [status["loaded"] for status in models.status()] == [False, True, True]
    models.unload(None)
    assert not any(status["loaded"] for status in models.status())


@pytest.fixture(scope="module")
def layered(tmp_path_factory) -> Path:
    return write_layered(tmp_path_factory.mktemp("captioning") / "tiny")


@pytest.fixture
def captioning(layered, monkeypatch) -> Path:
    """A tiny layered checkpoint that writes captions, of small images and in a few words."""
    name = "QwenImageLayeredPipeline"
    monkeypatch.setitem(variants.VARIANTS, name, replace(variants.VARIANTS[name], resolutions=(96, 160)))
    monkeypatch.setattr(caption, "MAX_TOKENS", 3)
    return layered


def test_a_caption_has_a_plan_with_all_that_it_loads(captioning):
    models, tasks = models_of(None, decompose=captioning)
    assert isinstance(tasks.work("caption", CaptionBody(image=png()))(Told())["caption"], str)
    ((work, plan),) = models._warm["decompose"].session.plans.items()
    assert work.captioned == 96**2
    parts = models.open("decompose").pipeline.components
    silent = make_plan(parts, replace(work, captioned=0), plan.residency)
    seen = sum(parts.weights(name).bytes_of(parts.weights(name).specs("main"), parts.dtype, None)
               for name in ("language_head", "vision"))  # fmt: skip
    assert plan.stages[0].resident - silent.stages[0].resident == seen
    tasks.work("decompose", DecomposeBody(image=png(), prompt="x", steps=1, num_layers=1))(Told())
    assert parts_of(models, "decompose") & {"language_head", "vision", "transformer"} == {"transformer"}


@pytest.mark.parametrize(("memory", "pixels", "resolution", "says"), [
    ("streamed", 1 << 22, None, "every word of a caption"),
    (None, 1024, None, "this server allows at most 1,024"),
    (None, 1 << 22, 4096, "resolution is 4096"),
])  # fmt: skip
def test_a_caption_is_bounded_in_memory_and_size(captioning, memory, pixels, resolution, says):
    models, _ = models_of(memory, decompose=captioning)
    tasks = Tasks(models, {task: {} for task in DEMOS}, Limits(pixels=pixels))
    with pytest.raises(RequestError, match=says):
        tasks.work("caption", CaptionBody(image=png(), resolution=resolution))(Told())


def test_a_caption_has_room_made_for_it(captioning):
    models, tasks = models_of(None, decompose=captioning)
    tasks.load("generate")(Told())
    body = CaptionBody(image=png())
    tasks.work("caption", body)(Told())
    ((_, plan),) = models._warm["decompose"].session.plans.items()
    models._memory = replace(models._memory, budget=plan.peak + 1000)
    assert models.is_loaded("generate")
    tasks.work("caption", body)(Told())
    assert not models.is_loaded("generate")


def test_a_job_s_feed_is_let_go_when_it_ends():
    tasks = models_of(None)[1]
    for body in (GenerateBody(prompt="x", steps=1), GenerateBody(prompt="x", width=16, height=16)):
        feed = Told()
        held = weakref.ref(feed)
        with suppress(RequestError):
            tasks.work("generate", body)(feed)
        del feed
        gc.collect()
        assert held() is None


# --- models that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The demo model with half of its transformer's file."""
    folder = tmp_path_factory.mktemp("secret-place") / "model"
    demo = HubSnapshot("demo")
    for name in ("model_index.json", *(name for part in PARTS for name in demo.names(part))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo.file(name), folder / name)
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


def test_values_that_are_not_finite_are_said(monkeypatch):
    monkeypatch.setattr(generation, "all_finite", lambda latents: False)
    _, tasks = models_of(None)
    with pytest.raises(ApiError, match="the generated latents are not finite") as refused:
        tasks.work("generate", GenerateBody(prompt="a", steps=1))(Told())
    assert refused.value.code == "model_error"


def test_a_model_that_cannot_be_used_is_said_without_its_place(broken, tmp_path):
    (tmp_path / "config.toml").write_text(
        '[default.qwen_image]\nlayered_model_path = "demo-layered"\nloras = ["/secret-place/none.safetensors"]\n'
    )
    models = ("--model", str(broken), "--edit-model", "demo-edit", "--config", str(tmp_path / "config.toml"))
    with serving(models=models) as server, server.client() as api:
        image = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        asked = [
            ("/api/qwen-image/generate", {"prompt": "x", "steps": 1}),
            ("/api/qwen-image/decompose", {"prompt": "x", "image": image, "steps": 1}),
            ("/models/load", {"task": "generate"}),
            ("/models/load", {"task": "decompose"}),
            ("/v1/images/generations", {"prompt": "x"}),
        ]
        for path, body in asked:
            answer = api.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_error"), (path, answer.text)
            assert "secret-place" not in answer.text
            assert ".safetensors" not in answer.text
        assert api.post("/api/qwen-image/edit", json={"prompt": "x", "image": image, "steps": 1}).status_code == 200
    assert any("secret-place" in line for line in server.log)


def test_facts_are_read_from_disk_alone(monkeypatch):
    asked = []

    def read(references, mode, targets, *, offline, download):
        asked.append(offline)
        raise HubError("not here yet")

    monkeypatch.setattr("qwen_image_mlx.lora.fetch.read_adapters", read)
    offers = {"generate": {"model": "demo", "quantize": None, "loras": ["owner/style"]}}
    models = Models(offers, None, None)
    models.read_facts()
    assert asked
    assert all(asked)
    assert models.facts("generate")["sizes"]["1:1"] == [64, 64]


def test_served_models_have_the_loras_that_generate_gives_them(monkeypatch, tmp_path):
    offered = []

    def serve(setup, listener, ready):
        offered.append({task: offer["loras"] for task, offer in setup.offers.items()})

    monkeypatch.setattr("qwen_image_mlx.server.run.serve", serve)
    file = tmp_path / "config.toml"
    file.write_text('[default.qwen_image]\nmodel_path = "demo"\nloras = ["o/style"]\n')
    for model in ("demo", "o/other"):
        assert main(["serve", "--port", "0", "--config", str(file), "--model", model, "--edit-model", "demo-edit"]) == 0
    assert offered == [
        {"generate": loras, "edit": [], "decompose": ["o/style"]} for loras in (["o/style"], [])
    ]  # fmt: skip


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_mask_s_padding_of_zero_is_a_padding():
    _, tasks = models_of(None)
    mask = Image.new("L", (96, 96))
    mask.paste(255, (8, 8, 32, 32))
    file = io.BytesIO()
    mask.save(file, "png")
    fields = {"prompt": "x", "image": png((96, 96)), "mask": file.getvalue(), "steps": 1, "seed": 1}
    generated = [
        tasks.work("edit", EditBody(**fields, mask_padding=padding))(Told())["images"][0] for padding in (None, 0, 4)
    ]
    assert [image["metadata"].get("mask_padding") for image in generated] == [None, 0, 4]
    assert len({image["image"] for image in generated}) == 3
    assert "keep_alpha" not in generated[0]["metadata"]


def test_a_phone_s_photo_is_decomposed_and_edited_at_its_own_size():
    _, tasks = models_of(None)
    photo = png((4032, 3024), kind="jpeg")
    for task, body in (
        ("decompose", DecomposeBody(image=photo, prompt="x", steps=1, num_layers=1)),
        ("edit", EditBody(image=photo, prompt="x", steps=1, size="source")),
    ):
        result = tasks.work(task, body)(Told())
        ((image,),) = [list(result[name]) for name in ("layers", "images") if name in result]
        data = base64.b64decode(image["image"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (4032, 3024)


@pytest.mark.parametrize(("task", "body", "says"), [
    ("generate", GenerateBody(prompt="x", steps=9), "9 steps"),
    ("generate", GenerateBody(prompt="x", steps=9, width=64, height=64), "9 steps"),
    ("generate", GenerateBody(prompt="x"), "12 steps"),
    ("generate", GenerateBody(prompt="x", steps=1, aspect="1:1"), "64x64"),
    ("edit", EditBody(prompt="x", image=png(), steps=9), "9 steps"),
    ("decompose", DecomposeBody(image=png(), steps=9), "9 steps"),
    ("decompose", DecomposeBody(image=png(), steps=1), "64x64"),
    ("decompose", DecomposeBody(image=png(), resolution=640), "resolution is 640"),
])  # fmt: skip
def test_what_is_beyond_the_limits_is_refused_before_it_waits(task, body, says):
    models, _ = models_of(None)
    models.read_facts()
    tasks = Tasks(models, {task: {} for task in DEMOS}, Limits(pixels=4000, steps=8))
    with pytest.raises(RequestError, match=says):
        tasks.work(task, body)


def test_a_limit_of_steps_is_no_bar_where_the_model_is_not_known_yet():
    models, _ = models_of(None)
    tasks = Tasks(models, {task: {} for task in DEMOS}, Limits(steps=20))
    assert tasks.work("generate", GenerateBody(prompt="x"))(Told())["images"]


def test_one_model_for_two_tasks_is_opened_once(tmp_path, monkeypatch):
    model = str(write_checkpoint_21(tmp_path / "model"))
    models, tasks = models_of(None, generate=model, edit=model)
    opened, open_one = [], Session.open

    def noted(options, *given, **more):
        opened.append(options["model"])
        return open_one(options, *given, **more)

    monkeypatch.setattr(Session, "open", noted)
    sized = {"prompt": "a fox", "steps": 1, "seed": 1}
    made = tasks.work("generate", GenerateBody(**sized, width=64, height=32))(Told())["images"][0]["metadata"]
    edited = tasks.work("edit", EditBody(**sized, images=[png(), png(colour="red")], size="64x64"))(Told())
    assert opened == [model]
    assert (made["width"], made["height"]) == (64, 32)
    assert edited["images"][0]["metadata"]["size"] == "64x64"
    assert models.is_loaded("generate")
    assert models.is_loaded("edit")
    models.unload("edit")
    assert not models.is_loaded("generate")
    with pytest.raises(ApiError):
        Models(models._offers | {"decompose": models._offers["edit"]}, None, None).open("decompose")
