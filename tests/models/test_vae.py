"""The 2-D autoencoder against diffusers' 3-D one, live, in fp32; strips against the whole, bit by bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import TINY
from mlx.utils import tree_flatten
from reference import make_vae, to_numpy

from qwen_image_mlx.models.qwen_image import vae
from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.models.qwen_image.vae import Decoder, Encoder
from qwen_image_mlx.pipeline import autoencode
from qwen_image_mlx.pipeline.autoencode import decode, decode_tail, encode_mode
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.reference

CONFIGS = {
    "tiny": {},
    "rgba": {"input_channels": 4},
    "wider": {"base_dim": 12, "num_res_blocks": 1},
}


class Pair:
    """The same random weights in both implementations."""

    def __init__(self, folder, overrides):
        config = {**TINY["vae"], **overrides}
        self.theirs = make_vae(config)
        self.theirs.save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        self.config = VAEConfig.from_dict({k: v for k, v in config.items() if not k.startswith("_")})
        tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
        weights = ComponentWeights(ROWS["vae"], self.config, tensors, ["encoder", "decoder"])
        self.encoder = load_module(Encoder(self.config), weights, "encoder", mx.float32)
        self.decoder = load_module(Decoder(self.config), weights, "decoder", mx.float32)
        self.mean, self.std = np.array(self.config.latents_mean), np.array(self.config.latents_std)

    def random_latents(self, height, width, seed=0):
        shape = (1, height, width, self.config.z_dim)
        return np.random.default_rng(seed).standard_normal(shape, np.float32)

    def reference_pixels(self, latents):
        raw = torch.from_numpy((latents * self.std + self.mean).astype(np.float32)).permute(0, 3, 1, 2)[:, :, None]
        with torch.no_grad():
            decoded = self.theirs.decode(raw, return_dict=False)[0][:, :, 0]
        return (to_numpy(decoded).transpose(0, 2, 3, 1) * 0.5 + 0.5).clip(0, 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(name="tiny"):
        if name not in made:
            made[name] = Pair(tmp_path_factory.mktemp("vae"), CONFIGS[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 12), (14, 10), (2, 2)])
def test_decoding_equals_the_reference(pair, name, size):
    both = pair(name)
    latents = both.random_latents(*size)
    ours = np.array(decode(both.decoder, both.config, mx.array(latents)))
    assert np.abs(ours - both.reference_pixels(latents)).max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(64, 96), (112, 80), (16, 16)])
def test_encoding_equals_the_reference(pair, name, size):
    both = pair(name)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, *size, both.config.input_channels)).astype(np.float32)
    ours = np.array(encode_mode(both.encoder, both.config, mx.array(pixels)))
    with torch.no_grad():
        posterior = both.theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None]).latent_dist
    expected = (to_numpy(posterior.mode())[:, :, 0].transpose(0, 2, 3, 1) - both.mean) / both.std
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.sampled
@pytest.mark.parametrize("size", [(8, 12), (15, 6), (33, 4), (64, 3), (50, 22)])
@pytest.mark.parametrize("strips", [2, 3, 4, 7, 1000])
def test_strips_change_no_bit(pair, size, strips):
    both = pair()
    latents = mx.array(both.random_latents(*size))
    whole = decode(both.decoder, both.config, latents, strips=1)
    assert mx.array_equal(decode(both.decoder, both.config, latents, strips=strips), whole)


def test_the_halo_is_exactly_the_receptive_field(pair, monkeypatch):
    """A NaN in one row of the tail's input spreads to just the rows of output that depend on it."""
    both = pair()
    x = np.zeros((1, 40, 3, 16), np.float32)
    x[:, 20] = np.nan
    x = mx.array(x)
    for stage in both.decoder.tail:
        x = stage(x)
    touched = np.flatnonzero(np.isnan(np.array(x)).any(axis=(0, 2, 3)))
    assert both.decoder.tail_halo == vae.BAND
    monkeypatch.setattr(vae, "BAND", 1)
    reach = both.decoder.tail_halo
    assert (touched[0], touched[-1]) == (2 * (20 - reach), 2 * (20 + reach) + 1)


def test_big_images_are_decoded_in_strips_of_their_own_accord(pair, monkeypatch):
    both = pair()
    latents = mx.array(both.random_latents(24, 16))
    counts = []
    monkeypatch.setattr(autoencode, "decode_tail", lambda decoder, x, strips: counts.append(strips))
    for strip_pixels in (1 << 40, 24 * 16 * 64, 6 * 16 * 64):
        monkeypatch.setattr(autoencode, "STRIP_PIXELS", strip_pixels)
        decode(both.decoder, both.config, latents)
    assert counts == [1, 1, 4]


def test_strips_take_less_memory(pair):
    both = pair()
    x = mx.random.normal((1, 480, 64, 16), key=mx.random.key(0))
    mx.eval(x)
    peaks, results = [], []
    for strips in (1, 8):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        results.append(decode_tail(both.decoder, x, strips))
        peaks.append(mx.get_peak_memory() - before)
    assert mx.array_equal(*results)
    assert peaks[1] < 0.5 * peaks[0]


def test_attention_in_chunks_is_exact(pair, monkeypatch):
    both = pair()
    latents = mx.array(both.random_latents(12, 10))
    whole = decode(both.decoder, both.config, latents)
    monkeypatch.setattr("qwen_image_mlx.models.autoencoder.ATTENTION_CHUNK", 7)
    np.testing.assert_allclose(np.array(decode(both.decoder, both.config, latents)), np.array(whole), atol=1e-5)


def test_dead_temporal_weights_do_not_matter(tmp_path):
    """Poison in the taps and resamplers no single image uses changes nothing."""
    clean = Pair(tmp_path / "clean", {})
    from safetensors.torch import load_file, save_file

    file = tmp_path / "clean" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "time_conv" in name:
            tensor.fill_(float("nan"))
        elif tensor.ndim == 5 and tensor.shape[2] == 3:
            tensor[:, :, :2] = float("nan")
    save_file(tensors, file)
    weights = ComponentWeights(
        ROWS["vae"], clean.config, component_tensors([file], dict.fromkeys(tensors, file.name)), ["decoder"]
    )
    poisoned = load_module(Decoder(clean.config), weights, "decoder", mx.float32)
    latents = mx.array(clean.random_latents(6, 6))
    assert mx.array_equal(decode(poisoned, clean.config, latents), decode(clean.decoder, clean.config, latents))


def test_taps_that_are_not_used_are_not_kept_in_memory(tmp_path):
    both = Pair(tmp_path, {"base_dim": 32})
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
    weights = ComponentWeights(ROWS["vae"], both.config, tensors, ["decoder"])
    mx.clear_cache()
    before = mx.get_active_memory()
    decoder = load_module(Decoder(both.config), weights, "decoder", mx.float32)
    size = sum(array.nbytes for _, array in tree_flatten(decoder.parameters()))
    assert mx.get_active_memory() - before < 1.1 * size
