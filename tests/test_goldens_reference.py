"""The golden files are what the reference computes today; `--write-goldens` writes them."""

from __future__ import annotations

import diffusers
import goldens
import numpy as np
import pytest
import torch
import transformers
from checkpoints import write_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from reference import load_reference, run_reference
from reference_edit import load_edit_reference, run_edit_reference

pytestmark = pytest.mark.reference

MADE_WITH = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
KINDS = {"edit": "edit", "edit_plus": "edit_plus", "edit_2511": "edit_plus", "decompose": "layered",
         "image_to_image": "img2img", "inpaint": "inpaint"}  # fmt: skip


@pytest.fixture
def hold(pytestconfig):
    """Compares arrays with a golden file, or writes it."""

    def check(name, arrays):
        if pytestconfig.getoption("write_goldens"):
            goldens.write(name, arrays, MADE_WITH)
        goldens.assert_agree(name, arrays, 1e-5)

    return check


def test_noise(hold):
    drawn = {
        f"{seed} {shape}": torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
        for seed in goldens.SEEDS
        for shape in goldens.NOISE_SHAPES
    }
    hold("noise", drawn)


def test_sigmas(hold):
    made = {}
    for name, (config, steps, tokens) in goldens.SCHEDULES.items():
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        lengths = (config["base_image_seq_len"], config["max_image_seq_len"])
        mu = calculate_shift(tokens, *lengths, config["base_shift"], config["max_shift"])
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        made[name] = scheduler.sigmas.numpy()
    hold("sigmas", made)


def test_tokens(hold, tmp_path):
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(write_tokenizer(tmp_path, tokenizer_json=True))
    ids = {str(number): np.array(tokenizer(text).input_ids) for number, text in enumerate(goldens.TEXTS)}
    hold("tokens", ids)


@pytest.mark.parametrize("name", goldens.GENERATIONS)
def test_generations(hold, tmp_path, monkeypatch, name):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as layered

    for module in (edit, layered):
        at_area = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio, f=at_area: f(goldens.AREA, ratio))
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", goldens.AREA)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", goldens.AREA)
    model, request = goldens.GENERATIONS[name]
    folder = goldens.CHECKPOINTS[model](tmp_path / "model")
    width, height = request["size"]
    call = {"prompt": goldens.PROMPT, "negative_prompt": goldens.NEGATIVE, "steps": goldens.STEPS,
            "cfg_scale": request["cfg_scale"], "seed": request["seed"]}  # fmt: skip
    if name not in KINDS:
        run = run_reference(load_reference(folder), width=width, height=height, **call)
        latents, images = run.latents, run.images
    else:
        if name == "decompose":
            call |= {"image": request["images"][0], "layers": request["layers"], "resolution": 640}
        elif "images" in request:
            several = name.startswith("edit_")
            call |= {"image": request["images"] if several else request["images"][0]}
            call |= {"width": width, "height": height} if several else {}
        else:
            call |= {"image": request["initial"], "strength": request["strength"], "width": width, "height": height}
            call |= {"mask_image": request["mask"]} if "mask" in request else {}
        latents, images = run_edit_reference(load_edit_reference(folder, KINDS[name]), **call)
        images = images[0] if name == "decompose" else images
    made = {f"latents {step}": value for step, value in enumerate(latents, 1)}
    hold(name, made | {f"image {number}": np.asarray(image) for number, image in enumerate(images)})


def test_training(hold, tiny):
    model = QwenImageTransformer2DModel.from_pretrained(tiny / "transformer")
    sigmas = FlowMatchEulerDiscreteScheduler().sigmas[list(goldens.LEVELS)]
    drawn = goldens.training_batch()
    latents, text, noise = (torch.from_numpy(drawn[key]) for key in ("latents", "text", "noise"))
    noisy = (1 - sigmas)[:, None, None] * latents + sigmas[:, None, None] * noise
    velocity = model(
        hidden_states=noisy, encoder_hidden_states=text, timestep=sigmas,
        img_shapes=[[(1, *goldens.GRID)]] * len(latents), return_dict=False,
    )[0]  # fmt: skip
    loss = torch.mean(((velocity - (noise - latents)) ** 2).reshape(len(latents), -1), 1).mean()
    loss.backward()
    gradients = {
        name: parameter.grad.numpy() for name, parameter in model.named_parameters() if name in goldens.TRAINED
    }
    made = {"loss": loss.detach().numpy(), "sigmas": sigmas.numpy()}
    hold("training", made | {name: gradients[name] for name in goldens.TRAINED})
