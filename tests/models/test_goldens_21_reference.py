"""The golden files of Qwen-Image-2.1 are what the reference computes today; `--write-goldens` writes them."""

from __future__ import annotations

import diffusers
import goldens
import numpy as np
import pytest
import torch
import transformers
from checkpoints_21 import (
    GENERATIONS_21,
    GRID,
    IMAGE_PLACES,
    PATCHES,
    PROMPT_21,
    SLOTS,
    SMALL_TEXT_ENCODER,
    TIMES,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE,
    golden_inputs,
    values_21,
)
from reference import to_numpy
from reference_21 import (
    make_pipeline_21,
    make_text_encoder_21,
    make_transformer_21,
    make_vae_21,
    run_pipeline_21,
)

pytestmark = pytest.mark.reference

MADE_WITH = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"


@pytest.fixture
def hold(pytestconfig):
    """Compares arrays with a golden file, or writes it."""

    def check(name, arrays):
        if pytestconfig.getoption("write_goldens"):
            goldens.write(name, arrays, MADE_WITH)
        goldens.assert_agree(name, arrays, 1e-5)

    return check


@pytest.fixture
def given():
    return {name: torch.from_numpy(value) for name, value in golden_inputs().items()}


def filled(model, *networks, config=None):
    """The model with the values that are made without torch."""
    made = [values_21(network, config) for network in networks]
    values = {name: torch.from_numpy(value) for tensors in made for name, value in tensors.items()}
    model.load_state_dict(values)
    return model


@torch.no_grad()
def test_transformer(hold, given):
    model = filled(make_transformer_21(TINY_TRANSFORMER), "transformer")
    is_image = np.zeros(20 + given["noise"].shape[1] // 4, bool)
    is_image[20:] = True
    for start, h, w in SLOTS:
        is_image[start : start + h * w // 4] = True
    made = {}
    for step, time in enumerate(TIMES):
        velocity = model(
            hidden_states=torch.cat([given["references"], given["noise"]], dim=1),
            encoder_hidden_states=given["states"], timestep=torch.tensor([time]),
            img_shapes=[[*((1, h, w) for _, h, w in SLOTS), (1, *GRID)]],
            img_mask=torch.from_numpy(is_image)[None], return_dict=False,
        )[0]  # fmt: skip
        made[f"velocity {step}"] = to_numpy(velocity)[:, -given["noise"].shape[1] :]
    hold("transformer_21", made)


@torch.no_grad()
def test_autoencoder(hold, given):
    model = filled(make_vae_21(TINY_VAE), "vae")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    latents, pixels = (given[key].permute(0, 3, 1, 2)[:, :, None] for key in ("latents", "pixels"))
    decoded = model.decode(latents * std + mean).sample
    assert decoded.abs().max() < 1
    encoded = (model.encode(pixels).latent_dist.mode() - mean) / std
    made = {"pixels": decoded * 0.5 + 0.5, "latents": encoded}
    hold("vae_21", {name: to_numpy(value)[:, :, 0].transpose(0, 2, 3, 1) for name, value in made.items()})


@torch.no_grad()
def test_text_encoder(hold, given):
    whole = filled(make_text_encoder_21(SMALL_TEXT_ENCODER), "text_encoder", "vision", "language_head")
    language, kept = whole.model.language_model, []
    language.norm.register_forward_hook(lambda _module, inputs, _output: kept.append(inputs[0]))
    slots = torch.zeros(1, 20, dtype=torch.bool)
    slots[:, IMAGE_PLACES] = True
    normed = language(
        input_ids=given["ids"], position_ids=given["positions"][:, None], attention_mask=torch.ones_like(given["ids"]),
        visual_pos_masks=slots, deepstack_visual_embeds=list(given["additions"]),
    ).last_hidden_state  # fmt: skip
    patches = given["patches"].reshape(-1, 3, 1, 256).repeat(1, 1, 2, 1).flatten(1)
    features = whole.model.visual(patches, grid_thw=torch.tensor([[1, *PATCHES]]))
    made = {"states": kept[0], "scores": whole.lm_head(normed), "features": features.pooler_output}
    made |= {f"tap {n}": tap for n, tap in enumerate(features.deepstack_features)}
    hold("text_encoder_21", {name: to_numpy(value) for name, value in made.items()})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    text = make_text_encoder_21(TINY_TEXT_ENCODER)
    return make_pipeline_21(
        tmp_path_factory.mktemp("processor"),
        transformer=filled(make_transformer_21(TINY_TRANSFORMER), "transformer"),
        vae=filled(make_vae_21(TINY_VAE), "vae"),
        text_encoder=filled(text, "text_encoder", "vision", "language_head", config=TINY_TEXT_ENCODER),
    )


@pytest.mark.parametrize("name", GENERATIONS_21)
def test_generation(hold, pipeline, name):
    run = GENERATIONS_21[name]
    latents, (image,) = run_pipeline_21(
        pipeline, prompt=PROMPT_21, negative_prompt=run["negative"], true_cfg_scale=run["cfg_scale"],
        image=run["images"] or None, width=run["size"][0], height=run["size"][1], num_inference_steps=3,
        output_resolution=96, seed=7,
    )  # fmt: skip
    hold(name, {f"latents {n}": values for n, values in enumerate(latents)} | {"image": np.asarray(image)})
