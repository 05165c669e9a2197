"""Whole runs on tiny checkpoints: their folder, going on, and results that the reference's pipeline generates alike."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_edit, write_layered
from PIL import Image

from qwen_image_mlx import GenerationParameters, QwenImagePipeline
from qwen_image_mlx.errors import CheckpointError, GPUError, OutputError, QwenImageError, RequestError
from qwen_image_mlx.images.colour import ignore_profiles
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.models.layers import QuantizedLinear
from qwen_image_mlx.training import checkpoints, loop, run, samples
from qwen_image_mlx.training.examples import Example
from qwen_image_mlx.training.lora import LoRALinear
from qwen_image_mlx.training.network import Network
from qwen_image_mlx.training.run import train
from qwen_image_mlx.training.settings import TrainingSettings
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.safetensors_files import read_header
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PAINTED = {"prompt": "a fox", "negative_prompt": "blurry", "width": 64, "height": 48, "steps": 3, "cfg_scale": 3.0,
           "seed": 5}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("models")
    edit = write_edit(folder / "edit", "edit_plus", transformer={"zero_cond_t": True})
    return {"t2i": tiny, "edit": edit, "layered": write_layered(folder / "layered")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose rows are whole groups."""
    configs = {**TINY, "transformer": replace(TINY["transformer"], num_attention_heads=4)}
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "model", configs, dtype=mx.float32)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = []
    for n, size in enumerate([(96, 96), (128, 64), (96, 96)]):
        coarse = rng.integers(0, 256, (5, 5, 4), np.uint8)
        coarse[1:3, 1:3, 3] = 0
        files.append(folder / f"{n}.png")
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    return {
        "t2i": [Example(f"fox {n}", file) for n, file in enumerate(files)],
        "edit": [Example("turn it", files[0], (files[1], files[2])), Example("shrink it", files[1], (files[0],))],
        "layered": [Example("a fox", files[0], layers=(files[0], files[2])), Example("b", files[1], layers=files[1:2])],
    }


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch):
    monkeypatch.setattr(samples, "STEPS", 4)


def settings(**options):
    defaults = {"steps": 4, "rank": 4, "alpha": 6.0, "resolution": 64, "batch_size": 2, "learning_rate": 0.03,
                "caption_dropout": 0.2, "save_every": 2}  # fmt: skip
    return TrainingSettings(**defaults | options)


def open_model(models, task="t2i", **options):
    return QwenImagePipeline.from_pretrained(models[task], dtype="float32", **options)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [(row["step"], row["loss"], row["gradient_norm"], row["rate"]) for row in log_of(folder)]


def generate(folder, images=(), **options):
    """8-bit image by our pipeline."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", **options)
    encoding = pipeline.encode_guidance_prompts(
        PAINTED["prompt"], PAINTED["negative_prompt"], images=images, sequential_positions=False
    )
    parameters = GenerationParameters(width=64, height=48, num_inference_steps=3, cfg_scale=3.0)
    return np.asarray(to_images(pipeline.generate_pixels(parameters, encoding, seed=5))[0]).astype(int)


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("targets", ["attention", "all", "attn.to_q, img_mlp.net.2,txt_in"])
def test_a_trained_lora_gives_the_reference_s_pixels(models, examples, tmp_path, targets, caplog):
    from diffusers.utils import logging as diffusers_logging
    from reference import load_reference, run_reference

    outcome = train(open_model(models), examples["t2i"], settings(targets=targets, rank=3), tmp_path / "run")
    assert outcome.result == tmp_path / "run" / "lora.safetensors"
    reference = load_reference(models["t2i"])
    caplog.clear()
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()
    try:
        reference.load_lora_weights(outcome.result, adapter_name="one")
    finally:
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_propagation()
    assert not caplog.text, "no missing or unexpected key"
    learned = reference.transformer.peft_config["one"]
    assert (learned.r, learned.lora_alpha) == (3, 6.0)
    branched = {name for name, module in reference.transformer.named_modules() if hasattr(module, "lora_A")}
    said = json.loads(read_header(outcome.result)[1]["lora_adapter_metadata"])
    assert set(said["transformer.target_modules"]) == branched, "the file names every matrix that it trains"
    expected = np.asarray(run_reference(reference, **PAINTED).image).astype(int)
    plain = generate(models["t2i"])
    for mode in ("merge", "side"):
        ours = generate(models["t2i"], loras=[str(outcome.result)], lora_mode=mode)
        assert np.abs(ours - expected).max() <= 1
    assert np.abs(plain - expected).max() > 8


@pytest.mark.reference
def test_an_edit_lora_gives_the_reference_s_pixels(models, examples, tmp_path, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
    from reference_edit import load_edit_reference, run_edit_reference

    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 96**2)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 128**2)
    name = "QwenImageEditPlusPipeline"
    small = replace(VARIANTS[name], encoder_area=96**2, reference_area=128**2)
    monkeypatch.setitem(VARIANTS, name, small)
    outcome = train(open_model(models, "edit"), examples["edit"], settings(), tmp_path / "run")
    source = Image.open(examples["edit"][1].image).convert("RGB")
    reference = load_edit_reference(models["edit"], "edit_plus")
    reference.load_lora_weights(outcome.result)
    wanted = {name: PAINTED[name] for name in ("prompt", "negative_prompt", "steps", "cfg_scale", "seed")}
    _, (expected,) = run_edit_reference(reference, image=[source], width=64, height=48, **wanted)
    ours = generate(models["edit"], [source], loras=[str(outcome.result)])
    assert np.abs(ours - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(ours - generate(models["edit"], [source])).max() > 8


@pytest.mark.reference
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_fully_trained_model_gives_the_reference_s_pixels(models, examples, tmp_path, ema):
    from reference import load_reference, run_reference

    wanted = settings(full=True, learning_rate=0.01, ema=ema, targets="attention")
    outcome = train(open_model(models), examples["t2i"], wanted, tmp_path / "run")
    assert outcome.result == tmp_path / "run" / "model"
    expected = np.asarray(run_reference(load_reference(outcome.result), **PAINTED).image).astype(int)
    ours = generate(outcome.result)
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(ours - generate(models["t2i"])).max() > 8
    state = mx.load(str(outcome.checkpoint))
    names = {name.split("/", 1)[1] for name in state if name.startswith("parameters/")}
    saved = mx.load(str(outcome.result / "transformer" / "diffusion_pytorch_model.safetensors"))
    for name in names:
        part = "parameters" if ema is None else "average"
        assert mx.array_equal(saved[name.partition(".")[2]], state[f"{part}/{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2i", "edit", "layered"])
def test_losses_fall_and_samples_are_those_of_the_result(models, examples, tmp_path, task):
    pipeline = open_model(models, task)
    wanted = settings(steps=30, sample_every=15, sample_prompts=("a fox", "a hare"), checkpointing=task == "edit")
    outcome = train(pipeline, examples[task], wanted, tmp_path / "run")
    losses = [loss for _, loss, *_ in losses_of(tmp_path / "run")]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-000015.png", "step-000030.png"]
    again = QwenImagePipeline.from_pretrained(
        models[task], dtype="float32", loras=[str(outcome.result)], lora_mode="side"
    )
    own = samples.Samples(again, examples[task][0], ("a fox", "a hare"), 64, tmp_path / "cache", seed=0)
    own.generate(again, tmp_path / "own.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (sheets[-1], tmp_path / "own.png"))
    assert np.abs(ours - theirs).max() <= 1
    first = np.asarray(Image.open(sheets[0])).astype(int)
    assert np.abs(first - ours).max() > 8
    assert Image.open(tmp_path / "run" / "plot.png").size[0] == 960


@pytest.mark.slow
def test_samples_of_a_full_run_use_the_trained_modulation(models, examples, tmp_path):
    wanted = settings(full=True, learning_rate=0.01, sample_every=4, sample_prompts=("a fox",))
    outcome = train(open_model(models), examples["t2i"], wanted, tmp_path / "run")
    trained = QwenImagePipeline.from_pretrained(outcome.result, dtype="float32")
    own = samples.Samples(trained, examples["t2i"][0], ("a fox",), 64, tmp_path / "cache", seed=0)
    own.generate(trained, tmp_path / "own.png")
    sheets = (tmp_path / "run" / "samples" / "step-000004.png", tmp_path / "own.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in sheets)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["transformer=8", "transformer=4"])
def test_a_packed_base_is_trained_beside(wide, examples, tmp_path, bits):
    pipeline = QwenImagePipeline.from_pretrained(wide, dtype="float32", quantize=bits)
    outcome = train(pipeline, examples["t2i"], settings(steps=12), tmp_path / "run")
    losses = [loss for _, loss, *_ in losses_of(tmp_path / "run")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    branches = [m for _, m in pipeline.components.network("transformer").named_modules() if isinstance(m, LoRALinear)]
    assert len(branches) == 14
    assert all(isinstance(branch.layer, QuantizedLinear) for branch in branches)
    assert {tensor.dtype for tensor in read_header(outcome.result)[0].values()} == {"F32"}


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_keeps_fp32(models, examples, tmp_path, monkeypatch):
    pipeline = QwenImagePipeline.from_pretrained(models["t2i"], dtype="bfloat16")
    seen = set()
    real = Network.__call__

    def call(self, *arguments):
        velocity = real(self, *arguments)
        seen.add(velocity.dtype)
        return velocity

    monkeypatch.setattr(Network, "__call__", call)
    outcome = train(pipeline, examples["t2i"], settings(steps=2), tmp_path / "run")
    assert seen == {mx.bfloat16}
    state = mx.load(str(outcome.checkpoint))
    assert {a.dtype for name, a in state.items() if not name.endswith("/step")} == {mx.float32}


# --- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(models, examples, tmp_path, full):
    wanted = settings(steps=6, full=full, schedule="cosine", warmup=2, accumulate=2, timesteps="logit_normal",
                      weighting="cosmap", shift=2.0, sample_every=5)  # fmt: skip
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(open_model(models), examples["t2i"], wanted, straight)
    done = []
    stopped = train(open_model(models), examples["t2i"], wanted, cut, on_step=done.append, stop=lambda: len(done) == 3)
    assert (stopped.result, stopped.steps, stopped.checkpoint.name) == (None, 3, "step-000003.safetensors")
    with (cut / "log.jsonl").open("a") as file:  # steps after the checkpoint, and half a line
        file.write('{"step": 4, "loss": 99}\n{"st')
    finished = train(open_model(models), examples["t2i"], wanted, cut, resume=True)
    assert losses_of(cut) == losses_of(straight)
    ours, theirs = (mx.load(str(folder / "checkpoints" / "step-000006.safetensors")) for folder in (cut, straight))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    assert (cut / "samples" / "step-000006.png").read_bytes() == (straight / "samples" / "step-000006.png").read_bytes()
    again = train(open_model(models), examples["t2i"], wanted, cut, resume=True)
    assert again == finished


@pytest.mark.slow
def test_a_run_that_was_cut_right_after_a_checkpoint_loses_none_of_its_files(models, examples, tmp_path, monkeypatch):
    class Cut(BaseException):
        """As a kill: nothing is written after it."""

    def cut(*_):
        raise Cut

    straight, again = tmp_path / "straight", tmp_path / "again"
    wanted = settings(steps=4, save_every=2)
    train(open_model(models), examples["t2i"], wanted, straight)
    with monkeypatch.context() as patched:
        patched.setattr(run, "save_lora", cut)
        with pytest.raises(Cut):
            train(open_model(models), examples["t2i"], wanted, again)
    assert [path.name for path in (again / "checkpoints").iterdir()] == ["step-000002.safetensors"]
    train(open_model(models), examples["t2i"], wanted, again, resume=True)
    files = [{path.name for path in folder.iterdir()} for folder in (straight, again)]
    assert files[0] == files[1]
    assert "lora-000002.safetensors" in files[0]
    ours, theirs = (mx.load(str(folder / "lora-000002.safetensors")) for folder in (again, straight))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_constant_rate_can_go_on_for_longer(models, examples, tmp_path):
    train(open_model(models), examples["t2i"], settings(steps=2), tmp_path / "run")
    longer = train(open_model(models), examples["t2i"], settings(steps=4), tmp_path / "run", resume=True)
    assert longer.steps == 4
    with pytest.raises(RequestError, match="has 4 steps already: ask for more"):
        train(open_model(models), examples["t2i"], settings(steps=2), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_other_settings_models_and_data_are_not_gone_on_with(models, examples, tmp_path):
    folder = tmp_path / "run"
    train(open_model(models), examples["t2i"], settings(steps=2), folder)
    cases = [
        ({"rank": 8}, "rank 4 and not 8"), ({"seed": 1}, "seed 0 and not 1"),
        ({"learning_rate": 1e-3}, "learning_rate 0.03 and not 0.001"), ({"full": True, "ema": 0.9}, "full False"),
    ]  # fmt: skip
    for options, said in cases:
        with pytest.raises(CheckpointError, match=f"belongs to a run with .*{said}"):
            train(open_model(models), examples["t2i"], settings(**options), folder, resume=True)
    other = [Example("a hare", examples["t2i"][0].image)]
    with pytest.raises(CheckpointError, match="belongs to a run with data"):
        train(open_model(models), other, settings(), folder, resume=True)
    with pytest.raises(CheckpointError, match=r"belongs to a run with .*model"):
        train(open_model(models, "edit"), examples["edit"], settings(), folder, resume=True)
    train(open_model(models), examples["t2i"], settings(save_every=1, steps=3), folder, resume=True)


@pytest.mark.slow
def test_folders_are_not_mixed_up(models, examples, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    with pytest.raises(RequestError, match="is not empty"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "full")
    (tmp_path / "finder").mkdir()
    (tmp_path / "finder" / ".DS_Store").write_text("")  # as macOS leaves it in a folder that was looked at
    train(open_model(models), examples["t2i"], settings(steps=1), tmp_path / "finder")
    with pytest.raises(RequestError, match="holds no run to resume"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "none", resume=True)
    with pytest.raises(RequestError, match="nothing to train on"):
        train(open_model(models), [], settings(), tmp_path / "none")
    with pytest.raises(RequestError, match="quantized weights cannot be trained"):
        train(open_model(models, quantize=4), examples["t2i"], settings(full=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- accidents -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(models, examples, tmp_path, monkeypatch):
    real = loop.Trainer.gradients
    monkeypatch.setattr(
        loop.Trainer, "gradients",
        lambda self, step: (float("nan"), real(self, step)[1]) if step == 2 else real(self, step),
    )  # fmt: skip
    with pytest.raises(loop.NotFinite, match=r"in step 3.*last good checkpoint is .*step-000002\.safetensors"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "run")
    assert (tmp_path / "run" / "lora-000002.safetensors").is_file()
    assert not (tmp_path / "run" / "lora.safetensors").exists()
    monkeypatch.undo()
    assert train(open_model(models), examples["t2i"], settings(), tmp_path / "run", resume=True).steps == 4


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_refused_in_its_first_step_leaves_nothing(models, examples, tmp_path, monkeypatch, existed):
    real = loop.Trainer.gradients
    monkeypatch.setattr(loop.Trainer, "gradients", lambda self, step: (float("nan"), real(self, step)[1]))
    if existed:
        (tmp_path / "run").mkdir()
    with pytest.raises(loop.NotFinite, match="no checkpoint exists before it"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*")] == (["run"] if existed else [])


def test_weights_that_are_not_numbers_are_not_saved(models, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "is_finite", property(lambda self: self.step < 2))
    with pytest.raises(loop.NotFinite, match="not finite after step 2"):
        train(open_model(models), examples["t2i"], settings(save_every=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001.safetensors"]


@pytest.mark.parametrize(("name", "resume"), [
    ("samples", True), ("checkpoints", True), ("cache", True), ("log.jsonl/", True), ("plot.png/", True),
])  # fmt: skip
def test_what_a_run_would_write_over_is_found_first(models, examples, tmp_path, name, resume):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    with pytest.raises(RequestError, match=f"has a {name.strip('/')} that does not belong to a run"):
        train(open_model(models), examples["t2i"], settings(), folder, resume=resume)
    assert [path.name for path in folder.iterdir()] == [name.strip("/")]


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_colours_it_began_with(models, examples, tmp_path):
    with ignore_profiles():
        train(open_model(models), examples["t2i"], settings(steps=1, save_every=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match="ignore_profile True and not None"):
        train(open_model(models), examples["t2i"], settings(steps=2), tmp_path / "run", resume=True)


@pytest.mark.parametrize("record", ["[]", "1", "null", '"a"', "[" * 100_000])
def test_a_checkpoint_with_an_odd_record_is_refused(tmp_path, record):
    metadata = {"format": checkpoints._FORMAT, "step": "1", "record": record}
    checkpoints.save_tensors(tmp_path / "step-000001.safetensors", {"a": mx.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_checkpoint(tmp_path / "step-000001.safetensors", None, {})


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(models, examples, tmp_path, monkeypatch):
    real, calls = checkpoints.save_tensors, []

    def save(path, *arguments):
        calls.append(path)
        if len(calls) > 1:
            raise OutputError(f"{path} could not be written: {OSError(errno.ENOSPC, 'No space left on device')}")
        return real(path, *arguments)

    monkeypatch.setattr(checkpoints, "save_tensors", save)
    with pytest.raises(OutputError, match=r"No space left.*step-000002\.safetensors, is whole, and the run can"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002.safetensors"]
    monkeypatch.undo()
    assert train(open_model(models), examples["t2i"], settings(), tmp_path / "run", resume=True).steps == 4


def test_a_disk_without_room_for_checkpoints_is_found_before_training(models, examples, tmp_path, monkeypatch):
    real = run.check_writable

    def check(path, nbytes):
        if path.name == "lora.safetensors":
            raise OutputError("the disk has 1 MB left")
        return real(path, nbytes)

    monkeypatch.setattr(run, "check_writable", check)
    with pytest.raises(OutputError, match="1 MB left"):
        train(open_model(models), examples["t2i"], settings(), tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
def test_a_sample_that_cannot_be_generated_does_not_stop_a_run(models, examples, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise QwenImageError("the generated latents are not finite")

    monkeypatch.setattr(samples.Samples, "generate", fail)
    wanted = settings(sample_every=2)
    assert train(open_model(models), examples["t2i"], wanted, tmp_path / "run").steps == 4
    assert "no samples after step 2: the generated latents are not finite" in caplog.text


@pytest.mark.slow
def test_a_gpu_that_refuses_its_process_in_a_sample_stops_a_run(models, examples, tmp_path, monkeypatch):
    def fail(*_):
        raise GPUError("the GPU refuses this process", fault="refused", fatal=True)

    monkeypatch.setattr(samples.Samples, "generate", fail)
    with pytest.raises(GPUError, match="refuses this process"):
        train(open_model(models), examples["t2i"], settings(sample_every=2), tmp_path / "run")
