"""The demo's autoencoder: fast forms that are the model's own, training that can be taken up again, files that others
read."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from demo import autoencoder, fast
from demo.autoencoder import Autoencoder, Trainer, held_out_images, module_weights, to_signed, training_images
from demo.checkpoint import write_component
from mlx.utils import tree_flatten

from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.pipeline.autoencode import decode, encode_mode
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.demo

TINY = VAEConfig(base_dim=4)


def run(stages, x: mx.array) -> mx.array:
    """A network's stages as a whole."""
    for stage in stages:
        out = stage(x)
        x = out if isinstance(out, mx.array) else mx.concatenate([*out], axis=1)
    return x


def pixels(*shape: int) -> mx.array:
    return mx.random.uniform(-1, 1, shape, key=mx.random.key(1))


def assert_close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> None:
    assert mx.abs(a - b).max().item() <= tolerance * mx.abs(b).max().item()


def test_silu_and_its_gradient():
    x = mx.linspace(-30, 30, 2001)
    assert_close(fast.silu(x), nn.silu(x), 1e-6)
    assert_close(mx.grad(lambda x: fast.silu(x).sum())(x), mx.grad(lambda x: nn.silu(x).sum())(x), 1e-5)


def test_fast_forms_are_the_models():
    model, x = Autoencoder(TINY), pixels(2, 32, 48, 3)
    mean, log_variance = fast.encode(model.encode_side, x)
    assert_close(mx.concatenate([mean, log_variance], axis=-1), run(model.encode_side.stages, x))
    plain = run([*model.decode_side.stages, *model.decode_side.tail], mean)
    assert plain.shape == x.shape
    assert_close(fast.decode(model.decode_side, mean), plain)


def test_their_gradients_are_the_models():
    model, x = Autoencoder(TINY), pixels(1, 16, 16, 3)

    def plain(model: Autoencoder) -> mx.array:
        mean, _ = mx.split(run(model.encode_side.stages, x), 2, axis=-1)
        return mx.square(run([*model.decode_side.stages, *model.decode_side.tail], mean)).sum()

    def quick(model: Autoencoder) -> mx.array:
        return mx.square(fast.decode(model.decode_side, fast.encode(model.encode_side, x)[0])).sum()

    expected = dict(tree_flatten(nn.value_and_grad(model, plain)(model)[1]))
    found = dict(tree_flatten(nn.value_and_grad(model, quick)(model)[1]))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_a_few_steps_on_one_image_bring_it_nearer(monkeypatch):
    images = training_images(0, 0, 1, 3)
    monkeypatch.setattr(autoencoder, "WARM_UP", 1)
    monkeypatch.setattr(autoencoder, "training_images", lambda *_: images)
    trainer = Trainer(TINY, 100, rate=0.05)
    first = trainer.run(1, batch=1)
    trainer.run(9, batch=1)
    assert trainer.run(10, batch=1) < 0.6 * first


def test_a_resumed_run_is_a_straight_one(tmp_path):
    straight = Trainer(TINY, 300)
    straight.run(2, batch=2)
    straight.save(tmp_path / "state.safetensors")
    straight.run(4, batch=2)
    resumed = Trainer(TINY, 300)
    resumed.restore(tmp_path / "state.safetensors")
    resumed.run(4, batch=2)
    for kind in ("parameters", "average"):
        for name, weight in getattr(straight, kind).items():
            assert mx.array_equal(getattr(resumed, kind)[name], weight), (kind, name)


def test_channels_that_the_first_weights_lack_begin_at_zero():
    first = Trainer(TINY, 300).parameters
    wider = Trainer(replace(TINY, input_channels=4), 300, weights=first)
    x = pixels(1, 16, 16, 4)
    four, three = wider.averaged(), Trainer(TINY, 300, weights=first).averaged()
    assert_close(fast.encode(four.encode_side, x)[0], fast.encode(three.encode_side, x[..., :3])[0], 1e-6)
    latents = mx.random.normal((1, 2, 2, 16), key=mx.random.key(0))
    out = fast.decode(four.decode_side, latents)
    assert_close(out[..., :3], fast.decode(three.decode_side, latents), 1e-6)
    assert not out[..., 3].any().item()


def test_training_images_are_repeatable_and_layers_are_among_them():
    images = training_images(0, 3, 16, 4)
    np.testing.assert_array_equal(images, training_images(0, 3, 16, 4))
    assert (images != training_images(0, 4, 16, 4)).any()
    opaque = (images[..., 3] == 255).all(axis=(1, 2))
    assert 2 < opaque.sum() < 14


@pytest.mark.reference
@pytest.mark.parametrize("channels", [3, 4])
def test_diffusers_and_our_pipeline_decode_the_files_alike(tmp_path, channels):
    import torch
    from diffusers import AutoencoderKLQwenImage

    config = replace(TINY, input_channels=channels)
    model = Autoencoder(config)
    config = autoencoder.with_statistics(model, config, count=50)
    write_component(tmp_path, "vae", config, module_weights(model), mx.float32)

    theirs = AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    tensors = component_tensors([tmp_path / "vae" / "diffusion_pytorch_model.safetensors"], None)
    weights = ComponentWeights(ROWS["vae"], config, tensors, ("encoder", "decoder"))
    ours = Autoencoder(config, seed=1)
    for part, module in (("encoder", ours.encode_side), ("decoder", ours.decode_side)):
        load_module(module, weights, part, mx.float32)

    x = to_signed(held_out_images(2, channels))
    latents = encode_mode(ours.encode_side, config, x)
    spread = latents * mx.array(config.latents_std) + mx.array(config.latents_mean)
    assert_close(spread, fast.encode(model.encode_side, x)[0])
    assert mx.abs(latents.mean()).item() < 0.5
    with torch.no_grad():
        seen = theirs.encode(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)[:, :, None]).latent_dist.mode()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        np.testing.assert_allclose(((seen - mean) / std)[:, :, 0].permute(0, 2, 3, 1), np.array(latents), atol=1e-4)
        images = theirs.decode(seen).sample[:, :, 0].permute(0, 2, 3, 1)
    expected = np.clip(images.numpy() * 0.5 + 0.5, 0, 1)
    np.testing.assert_allclose(np.array(decode(ours.decode_side, config, latents)), expected, atol=1e-4)
