"""LoRAs of Qwen-Image-2.1: one change in every dialect and every way of running; others are named."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from checkpoints_21 import TINY_TRANSFORMER
from lora_files import DIALECTS

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.lora.branch import SideBranch
from qwen_image_mlx.lora.distillations import distillation_of
from qwen_image_mlx.lora.file import read_lora
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig as TransformerConfig21
from qwen_image_mlx.pipeline.conditioning import GuidanceEncoding
from qwen_image_mlx.pipeline.generation import schedule_of
from qwen_image_mlx.pipeline.identify import read_known_lora
from qwen_image_mlx.pipeline.parameters import GenerationParameters
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.sampling.schedule import make_schedule, static_shift
from qwen_image_mlx.weights.mapping import matrix_shapes

pytestmark = pytest.mark.slow

BLOCK = "transformer_blocks.1"
GATE, UP, FUSED = (f"{BLOCK}.img_mlp.{name}" for name in ("gate_layer", "proj", "gate_up"))
MODULATION = ("modulation.1", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear")
RESIDENT = (f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_out.0", f"{BLOCK}.img_mlp.out", GATE, UP, "txt_in.in_layer",
            "txt_in.out_layer", "img_in", "proj_out")  # fmt: skip
USED = (*RESIDENT, *MODULATION)
SHAPES = matrix_shapes(component_of("QwenImage21Transformer2DModel"), TransformerConfig21.from_dict(TINY_TRANSFORMER))
FIRST = matrix_shapes(component_of("QwenImageTransformer2DModel"), TransformerConfig(num_layers=2))


def factors(shape, rank=4, seed=0, size=0.3):
    """A (rank, in) and B (out, rank), fp32."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, shape[1]))
    b = rng.standard_normal((shape[0], rank)) * size / 2 / shape[1] ** 0.5
    return a.astype(np.float32), b.astype(np.float32)


def write(path, dialect="peft", targets=USED, shapes=SHAPES):
    """The same LoRA of rank 4 in a dialect's spelling."""
    down, up, alpha = DIALECTS[dialect]
    tensors = {}
    for seed, target in enumerate(targets):
        name = target.replace(".", "_") if dialect == "flat" else target
        a, b = factors(shapes[target], seed=seed)
        tensors |= {down.format(name): mx.array(a), up.format(name): mx.array(b)}
        if alpha:
            tensors[alpha.format(name)] = mx.array(2.0)
    mx.save_safetensors(str(path), tensors)
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_changes(tmp_path, dialect):
    lora = read_lora(write(tmp_path / "a.safetensors", dialect), SHAPES)
    assert set(lora.updates) == set(USED)
    assert not lora.unmatched
    for seed, target in enumerate(USED):
        a, b = factors(SHAPES[target], seed=seed)
        found = np.array(lora.updates[target].delta(mx.zeros(SHAPES[target])))
        np.testing.assert_allclose(found, b @ a * (0.5 if DIALECTS[dialect][2] else 1), atol=1e-5)


@pytest.mark.parametrize("name", ["diffusion_model.{}", "lora_unet_{}", "{}"])
def test_a_fused_gate_up_changes_its_two_matrices(tmp_path, name):
    inner, dim = SHAPES[GATE]
    a, b = factors((2 * inner, dim))
    place = name.format(FUSED if "unet" not in name else FUSED.replace(".", "_"))
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {
        f"{place}.lora_down.weight": mx.array(a), f"{place}.lora_up.weight": mx.array(b),
    })  # fmt: skip
    lora = read_lora(tmp_path / "a.safetensors", SHAPES)
    assert set(lora.updates) == {GATE, UP}
    found = np.concatenate([np.array(lora.updates[target].delta(mx.zeros((inner, dim)))) for target in (GATE, UP)])
    np.testing.assert_allclose(found, b @ a, atol=1e-5)  # the gate's rows come first


def test_a_lora_of_the_other_generation_is_refused_by_its_name(tmp_path):
    first = ("transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.attn.add_q_proj")
    for dialect in DIALECTS:
        with pytest.raises(CheckpointError, match=r"made for Qwen-Image 1\.x.*use a LoRA made for Qwen-Image-2\.1"):
            read_lora(write(tmp_path / "1.safetensors", dialect, first, FIRST), SHAPES)
        with pytest.raises(CheckpointError, match=r"made for Qwen-Image-2\.1.*use a LoRA made for Qwen-Image 1\.x"):
            read_lora(write(tmp_path / "2.safetensors", dialect, (GATE, UP)), FIRST)
    mixed = (*first, "transformer_blocks.0.attn.to_q")
    with pytest.raises(CheckpointError, match=r"made for Qwen-Image 1\.x, although some of its names fit"):
        read_lora(write(tmp_path / "1.safetensors", targets=mixed, shapes=FIRST), SHAPES)


def test_where_all_names_fit_the_width_tells(tmp_path):
    """Attention's names are those of both."""
    both = {"transformer_blocks.0.attn.to_q": (3072, 3072)}
    with pytest.raises(CheckpointError, match=r"made for Qwen-Image 1\.x: .* has 3072 columns.* has 96; use a LoRA"):
        read_lora(write(tmp_path / "1.safetensors", targets=both, shapes=both), SHAPES)
    lora, models = read_known_lora(write(tmp_path / "2.safetensors", targets=both, shapes=both))
    assert (lora.matched, models) == (1, "the released models of Qwen-Image 1.x")
    both = {"transformer_blocks.0.attn.to_q": (4096, 4096)}
    assert read_known_lora(write(tmp_path / "3.safetensors", targets=both, shapes=both))[1].endswith("2.1")


def test_a_file_with_whole_weights_in_addition_is_refused(tmp_path):
    """As distillations with an output layer for each step: without these it would be half applied."""
    name = f"{BLOCK}.attn.to_q"
    a, b = factors(SHAPES[name])
    tensors = {f"{name}.lora_down": mx.array(a), f"{name}.lora_up": mx.array(b), "proj_out.weight": mx.zeros((4, 2, 3))}
    mx.save_safetensors(str(tmp_path / "steps.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"whole weights in addition to its changes \(proj_out\.weight\)"):
        read_lora(tmp_path / "steps.safetensors", SHAPES)


# --- distilled LoRAs -------------------------------------------------------------------------------------------------

SCHEDULER = SchedulerConfig(max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02, use_dynamic_shifting=True)
TURBO = "qwen_image_2.1_turbo_lora_avg_rank_178_bf16"
NAMES = {
    "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-lora-r128": (6, None, False),
    "Qwen-Image-2.1-viggle-turbo-4step-lora-r64": (4, None, False),
    "p_qwen_image_2.1_8step_v0.1": (8, 1.0, True),
    "p_q_image_2.1_5_steps_bf16": (5, 1.0, True),
    "p_q_image_2.1_6_steps_bf16": (6, 2.0, True),
    TURBO: (8, 1.0, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_distilled_loras_are_known_by_their_names(tmp_path, name):
    steps, shift, stretch = NAMES[name]
    distilled = distillation_of(read_lora(write(tmp_path / f"{name}.safetensors"), SHAPES))
    assert (distilled.steps, distilled.cfg_scale, distilled.evidence) == (steps, 1.0, "its name")
    assert (distilled.static_shift, distilled.stretch) == (shift, stretch)
    assert distilled.sigmas is None or len(distilled.sigmas) == steps


@pytest.mark.parametrize(
    ("folder", "steps"),
    [
        ("models--Viggle--Qwen-Image-2.1-viggle-turbo/snapshots/0123abcd", 6),
        ("models--Viggle--Qwen-Image-2.1-viggle-turbo/snapshots/0123abcd/peft/4step-lora-r64", 4),
        ("loras/viggle-turbo-v0.2-5step/peft", 5),
    ],
)
def test_peft_s_own_layout_is_known_by_its_folders(tmp_path, folder, steps):
    """adapter_model.safetensors with adapter_config.json, which has the scale."""
    (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / folder / "adapter_model.safetensors"
    names = {f"base_model.model.{target}": shape for target, shape in SHAPES.items()}
    write(file, targets=[f"base_model.model.{target}" for target in USED], shapes=names)
    (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    lora = read_lora(file.parent, SHAPES)
    assert not lora.unmatched
    assert {update.scale for update in lora.updates.values()} == {2.0}
    distilled = distillation_of(lora)
    assert (distilled.steps, distilled.stretch, distilled.evidence) == (steps, False, "its folder's name")
    assert len(distilled.sigmas) == steps


def test_others_are_not_distilled(tmp_path):
    for name in ("film-6steps", "p_quiet_image_2.1_8step", "pruna"):
        assert distillation_of(read_lora(write(tmp_path / f"{name}.safetensors"), SHAPES)) is None


def scheduled(folder, lora, steps=None, size=(64, 96)):
    pipeline = QwenImagePipeline.from_pretrained(folder, loras=[lora])
    parameters = GenerationParameters(width=size[0], height=size[1], **pipeline.recommended_at(steps)._asdict())
    return schedule_of(pipeline.components, parameters, size[0] * size[1] // 256, ()).sigmas


def test_viggle_keeps_the_shift_by_size_and_drops_the_terminal_stretch(tmp_path, tiny_21):
    """sigma' = e^mu / (e^mu + 1 / sigma - 1), mu on the model's line, whatever the number of steps."""
    lora = write(tmp_path / "viggle-turbo-6step.safetensors")
    mu = 0.5 + (24 - 256) * (0.9 - 0.5) / (8192 - 256)
    for steps, nodes in {None: (1, 0.9375, 0.875, 0.75, 0.5, 0.25), 4: (1, 0.75, 0.5, 0.25), 2: (1, 0.5)}.items():
        expected = [math.exp(mu) / (math.exp(mu) + 1 / node - 1) for node in nodes]
        np.testing.assert_allclose(scheduled(tiny_21, lora, steps), [*expected, 0], rtol=1e-5)


def test_turbo_s_and_pruna_s_levels_are_used_as_they_stand(tmp_path, tiny_21):
    turbo = scheduled(tiny_21, write(tmp_path / f"{TURBO}.safetensors"))
    saved = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]  # Turbo's own model_index.json
    np.testing.assert_allclose(turbo, [*saved, 0], rtol=1e-6)
    pruna = scheduled(tiny_21, write(tmp_path / "p_qwen_image_2.1_8step.safetensors"))
    uniform = make_schedule(static_shift(SCHEDULER, 2.0), [1 - n / 8 for n in range(8)], mu=0.0).sigmas
    np.testing.assert_allclose(pruna, uniform, rtol=1e-6)


# --- in the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoding():
    return GuidanceEncoding(mx.array(np.random.default_rng(0).standard_normal((1, 7, 64)).astype(np.float32)))


def latents(folder, encoding, **options):
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", **options)
    parameters = GenerationParameters(width=64, height=32, num_inference_steps=2, cfg_scale=1.0)
    return np.array(pipeline.denoise_latents(parameters, encoding, seed=1)), pipeline


def test_merged_unmerged_and_streamed_give_one_result(tiny_21, encoding, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write(tmp_path / "lora.safetensors")
    plain, _ = latents(tiny_21, encoding)
    merged, _ = latents(tiny_21, encoding, loras=[file], lora_mode="merge")
    assert f"the other {len(MODULATION)} are merged where the modulation is made" in caplog.text
    assert np.abs(merged - plain).max() > 0.05
    for options in ({"lora_mode": "side"}, {"streamed": ("transformer",)}):
        found, _ = latents(tiny_21, encoding, loras=[file], **options)
        np.testing.assert_allclose(found, merged, atol=2e-4)
    _, pipeline = latents(tiny_21, encoding, loras=[file], lora_mode="side")
    kinds = {name: type(m) for name, m in pipeline.components.network("transformer").named_modules()}
    assert {kinds[name] for name in RESIDENT} == {SideBranch}
    pipeline.set_loras([])
    assert pipeline.is_transformer_loaded
    parameters = GenerationParameters(width=64, height=32, num_inference_steps=2, cfg_scale=1.0)
    np.testing.assert_array_equal(np.array(pipeline.denoise_latents(parameters, encoding, seed=1)), plain)


def test_quantized_weights_keep_the_change(tiny_21, encoding, tmp_path):
    file = write(tmp_path / "lora.safetensors")
    exact, plain = latents(tiny_21, encoding, loras=[file])[0], latents(tiny_21, encoding)[0]
    for mode in ("merge", "side"):
        found, _ = latents(tiny_21, encoding, loras=[file], lora_mode=mode, quantize="transformer=8/32")
        assert np.abs(found - exact).mean() < 0.2 * np.abs(plain - exact).mean()


@pytest.mark.slow
def test_the_command_line_says_and_records_the_schedule_and_yields_to_flags(tiny_21, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "viggle-turbo-v0.2.1-6step.safetensors")
    usual = ["--model", str(tiny_21), "--dtype", "float32", "--width", "64", "--height", "32", "--seed", "5"]
    lora = ["--lora", "viggle-turbo-v0.2.1-6step.safetensors"]
    assert main(["generate", "x", *usual, *lora, "-o", "a.png"]) == 0
    assert "6 steps, guidance 1 and its own 6 noise levels, the model's own shift and no terminal stretch" in (
        capsys.readouterr().err
    )
    said = json.loads(Image.open("a.png").info["qwen_image_mlx"])
    assert (said["steps"], said["cfg_scale"], said["shift"], said["stretch"]) == (6, 1.0, None, False)
    assert said["sigmas"] == [1.0, 0.9375, 0.875, 0.75, 0.5, 0.25]
    assert main(["generate", "--from-image", "a.png", "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["generate", "--from-image", "a.png", "--steps", "4", "-o", "c.png"]) == 0
    said = json.loads(Image.open("c.png").info["qwen_image_mlx"])
    assert (said["steps"], said["sigmas"]) == (4, [1.0, 0.75, 0.5, 0.25])


@pytest.mark.reference
def test_peft_s_lora_gives_the_reference_s_latents(tmp_path):
    """Saved by PEFT, with its settings; diffusers loads the same file."""
    from checkpoints_21 import TINY_TEXT_ENCODER, TINY_VAE, write_rest_21
    from peft import LoraConfig
    from reference_21 import (
        make_pipeline_21,
        make_text_encoder_21,
        make_transformer_21,
        make_vae_21,
        run_pipeline_21,
    )

    folder = tmp_path / "model"
    models = {
        "transformer": make_transformer_21(TINY_TRANSFORMER),
        "vae": make_vae_21(TINY_VAE),
        "text_encoder": make_text_encoder_21(TINY_TEXT_ENCODER),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    pipe = make_pipeline_21(folder / "processor", **models)
    write_rest_21(folder)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(USED), init_lora_weights=False)
    models["transformer"].add_adapter(config, adapter_name="one")
    models["transformer"].save_lora_adapter(tmp_path / "lora", adapter_name="one")
    asked = {"prompt": "a fox", "width": 64, "height": 96, "num_inference_steps": 2, "seed": 3}
    expected, _ = run_pipeline_21(pipe, **asked)
    models["transformer"].disable_adapters()
    plain, _ = run_pipeline_21(pipe, **asked)
    assert np.abs(plain[-1] - expected[-1]).max() > 0.05
    for mode in ("merge", "side"):
        ours = QwenImagePipeline.from_pretrained(folder, dtype="float32", loras=[tmp_path / "lora"], lora_mode=mode)
        made: list[np.ndarray] = []

        def told(progress, made=made):
            if progress.stage == "denoise" and progress.step:
                made.append(np.array(progress.latents))

        ours.generate(
            "a fox", width=64, height=96, num_inference_steps=2, seed=3,
            progress=told,
        )  # fmt: skip
        assert max(np.abs(a - b).max() for a, b in zip(made, expected, strict=True)) <= 1e-4
