"""The transformer and the autoencoder of Qwen-Image-2.1 against diffusers' classes, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints_21 import TINY_TRANSFORMER, TINY_VAE
from mlx.utils import tree_flatten
from reference import to_numpy
from reference_21 import full_size_meta_21, make_transformer_21, make_vae_21

from qwen_image_mlx.models.qwen_image import vae as first_vae
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image_21.denoiser import Condition, Denoiser, Reference, kept_values
from qwen_image_mlx.models.qwen_image_21.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image_21.transformer import Transformer
from qwen_image_mlx.models.qwen_image_21.vae import Decoder, Encoder
from qwen_image_mlx.pipeline.autoencode import decode, encode_mode
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import LAYOUTS, expected_tensors
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header

pytestmark = pytest.mark.reference

TRANSFORMER, VAE = "QwenImage21Transformer2DModel", "AutoencoderKLQwenImage21"


def stored(folder, model, name="diffusion_pytorch_model"):
    model.save_pretrained(folder)
    file = folder / f"{name}.safetensors"
    return component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))


class Pair:
    """The same random transformer in both implementations."""

    def __init__(self, folder, overrides, dtype=mx.float32):
        config = {**TINY_TRANSFORMER, **overrides}
        self.theirs = make_transformer_21(config)
        self.config, self.dtype = TransformerConfig.from_dict(config), dtype
        tensors = stored(folder, self.theirs)
        weights = ComponentWeights(component_of(TRANSFORMER), self.config, tensors, ["main", "modulation"])
        self.ours = load_module(Transformer(self.config), weights, "main", dtype)
        self.modulation = load_module(TimeModulation(self.config), weights, "modulation", dtype)

    def inputs(self, grid, slots, length, seed=0):
        """Noise, states and each reference's latents; `slots` are (start, rows, columns) of the references' latents."""
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((1, grid[0] * grid[1], self.config.in_channels), np.float32)
        states = 3 * rng.standard_normal((1, length, self.config.context_in_dim), np.float32)
        references = [rng.standard_normal((1, h * w, self.config.in_channels), np.float32) for _, h, w in slots]
        return noise, states, references

    def reference(self, noise, states, references, slots, grid, timestep):
        is_image = np.zeros(states.shape[1] + noise.shape[1] // 4, bool)
        is_image[states.shape[1] :] = True
        for start, h, w in slots:
            is_image[start : start + h * w // 4] = True
        with torch.no_grad():
            out = self.theirs(
                hidden_states=torch.from_numpy(np.concatenate([*references, noise], axis=1)),
                encoder_hidden_states=torch.from_numpy(states),
                timestep=torch.tensor([timestep]),
                img_shapes=[[*((1, h, w) for _, h, w in slots), (1, *grid)]],
                img_mask=torch.from_numpy(is_image)[None],
                return_dict=False,
            )[0]
        return to_numpy(out)[:, -noise.shape[1] :]

    def denoiser(self, states, references, slots, grid, timesteps, keep=True):
        *table, still = self.modulation.table(mx.array([*timesteps, 0.0]), self.dtype)
        return Denoiser(
            self.ours, self.config, table=table, still=still,
            conditions=[Condition(mx.array(s), tuple(start for start, *_ in slots)) for s in states],
            references=[Reference(mx.array(r), h, w) for r, (_, h, w) in zip(references, slots, strict=True)],
            grid=grid, dtype=self.dtype, keep_prefix=keep,
        )  # fmt: skip


CONFIGS = {"tiny": {}, "one block": {"num_layers": 1}, "narrow": {"num_attention_heads": 1, "mlp_ratio": 2}}
SLOTS = {
    "text alone": (),
    "one": ((3, 4, 6),),
    "three": ((2, 4, 4), (9, 2, 8), (17, 6, 2)),
    "side by side": ((0, 4, 4), (4, 4, 4)),
    "at the end": ((5, 6, 6),),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(name="tiny"):
        if name not in made:
            made[name] = Pair(tmp_path_factory.mktemp("transformer"), CONFIGS[name])
        return made[name]

    return get


def length_of(slots, name):
    return max((start + h * w // 4 for start, h, w in slots), default=0) + (0 if name == "at the end" else 7)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("grid", [(4, 6), (2, 10)])
def test_velocity_equals_the_reference(pair, name, slots, grid):
    both, places = pair(name), SLOTS[slots]
    noise, states, references = both.inputs(grid, places, length_of(places, slots))
    expected = both.reference(noise, states, references, places, grid, 0.73)
    (ours,) = both.denoiser([states], references, places, grid, [0.73]).velocities(mx.array(noise), 0)
    assert np.abs(np.array(ours) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("slots", SLOTS)
def test_steps_with_a_kept_prefix_equal_the_reference_and_those_without(pair, slots):
    both, places, grid, times = pair(), SLOTS[slots], (4, 6), [1.0, 0.6, 0.2]
    noise, states, references = both.inputs(grid, places, length_of(places, slots))
    other = both.inputs(grid, places, length_of(places, slots), seed=5)[1]
    kept, anew = (both.denoiser([states, other], references, places, grid, times, keep) for keep in (True, False))
    for step, time in enumerate(times):
        x = noise * (1 - 0.1 * step)
        ours, again = (denoiser.velocities(mx.array(x), step) for denoiser in (kept, anew))
        for given, ours_one, again_one in zip((states, other), ours, again, strict=True):
            expected = both.reference(x, given, references, places, grid, time)
            assert np.abs(np.array(ours_one) - expected).max() < 2e-5 * np.abs(expected).max()
            assert np.abs(np.array(ours_one) - np.array(again_one)).max() < 1e-6 * np.abs(expected).max()


def test_a_kept_prefix_runs_the_target_alone(pair, monkeypatch):
    both, places, grid = pair(), SLOTS["three"], (4, 6)
    noise, states, references = both.inputs(grid, places, 30)
    denoiser = both.denoiser([states], references, places, grid, [1.0, 0.5])
    mx.eval(denoiser.velocities(mx.array(noise), 0))
    made = []
    mx.eval(denoiser.velocities(mx.array(noise), 1, on_layer=made.append))
    assert [[array.shape for array in arrays] for arrays in made] == [[(1, 24, both.config.dim)]] * 3
    tokens = 30 - sum(h * w // 4 for _, h, w in places) + sum(h * w for _, h, w in places)
    kept = sum(a.nbytes for branch in denoiser._branches for seen in branch.prefix for a in seen)
    assert kept == 4 * kept_values(both.config, tokens, 1)


@pytest.mark.parametrize("timestep", [1.0, 0.5, 0.02, 0.0])
def test_timestep_reaches_the_result_as_in_the_reference(pair, timestep):
    both, grid = pair(), (4, 4)
    noise, states, _ = both.inputs(grid, (), 5)
    (ours,) = both.denoiser([states], [], (), grid, [timestep]).velocities(mx.array(noise), 0)
    expected = both.reference(noise, states, [], (), grid, timestep)
    moved = both.reference(noise, states, [], (), grid, (timestep + 0.3) % 1.2)
    assert np.abs(np.array(ours) - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(np.array(ours) - moved).max() > 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_stay_in_the_dtype_of_the_model(tmp_path, dtype):
    both, places, grid = Pair(tmp_path, {}, dtype), SLOTS["one"], (4, 4)
    noise, states, references = both.inputs(grid, places, 20)
    denoiser, made = both.denoiser([states], references, places, grid, [0.5, 0.2]), []
    for step in range(2):
        (out,) = denoiser.velocities(mx.array(noise).astype(dtype), step, on_layer=made.extend)
        assert out.dtype == dtype
    assert {array.dtype for array in made} == {dtype}
    assert {array.dtype for _, array in tree_flatten(both.ours.parameters())} == {dtype}


def test_a_step_never_waits_for_a_result(pair):
    """Inside mx.compile any evaluation raises. The result is not evaluated, which would compile kernels for seconds."""
    both, places, grid = pair(), SLOTS["one"], (4, 4)
    noise, states, references = both.inputs(grid, places, 20)
    table = both.modulation.table(mx.array([0.5, 0.0]), mx.float32)

    def step(x, s, r):
        denoiser = Denoiser(
            both.ours, both.config, table=table[:1], still=table[1], conditions=[Condition(s, (3,))],
            references=[Reference(r, 4, 6)], grid=grid, dtype=mx.float32,
        )  # fmt: skip
        return denoiser.velocities(x, 0)[0]

    arguments = [mx.array(a) for a in (noise, states, references[0])]
    assert mx.compile(step)(*arguments).shape == step(*arguments).shape


def test_rows_of_a_batch_are_those_of_its_samples(pair):
    modulation = pair().modulation
    times = mx.array([0.9, 0.3])
    batch, table = modulation(times, mx.float32), modulation.table(times, mx.float32)
    for n, rows in enumerate(table):
        for ours, single in zip(batch, rows, strict=True):
            assert ours.shape == (2, 1, pair().config.dim)
            assert mx.array_equal(ours[n, 0], single)


class Autoencoder:
    """The same random autoencoder in both implementations."""

    def __init__(self, folder, overrides):
        self.theirs = make_vae_21({**TINY_VAE, **overrides})
        self.config = VAEConfig.from_dict({**TINY_VAE, **overrides})
        weights = ComponentWeights(component_of(VAE), self.config, stored(folder, self.theirs), ["encoder", "decoder"])
        self.encoder = load_module(Encoder(self.config), weights, "encoder", mx.float32)
        self.decoder = load_module(Decoder(self.config), weights, "decoder", mx.float32)
        self.mean, self.std = np.array(self.config.latents_mean), np.array(self.config.latents_std)

    def latents(self, height, width):
        return np.random.default_rng(0).standard_normal((1, height, width, self.config.z_dim), np.float32)


AUTOENCODERS = {
    "tiny": {},
    "encoder's width": {"decoder_base_dim": None},
    "other frames": {"temperal_downsample": [True, True, False, True], "num_res_blocks": 1, "base_dim": 8},
    "rgb": {"in_channels": 3, "out_channels": 3},
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    made = {}

    def get(name="tiny"):
        if name not in made:
            made[name] = Autoencoder(tmp_path_factory.mktemp("vae"), AUTOENCODERS[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("size", [(4, 6), (7, 2)])
def test_decoding_equals_the_reference(autoencoder, name, size):
    both = autoencoder(name)
    latents = both.latents(*size)
    raw = torch.from_numpy((latents * both.std + both.mean).astype(np.float32)).permute(0, 3, 1, 2)[:, :, None]
    with torch.no_grad():
        decoded = both.theirs.decode(raw, return_dict=False)[0][:, :, 0]
    expected = (to_numpy(decoded).transpose(0, 2, 3, 1) * 0.5 + 0.5).clip(0, 1)
    assert 0.05 < expected.std() < 0.5
    assert np.abs(np.array(decode(both.decoder, both.config, mx.array(latents))) - expected).max() < 1e-5


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("size", [(64, 96), (112, 32)])
def test_encoding_equals_the_reference(autoencoder, name, size):
    both = autoencoder(name)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, *size, both.config.in_channels)).astype(np.float32)
    with torch.no_grad():
        posterior = both.theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None]).latent_dist
    expected = (to_numpy(posterior.mode())[:, :, 0].transpose(0, 2, 3, 1) - both.mean) / both.std
    ours = np.array(encode_mode(both.encoder, both.config, mx.array(pixels)))
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("size", [(4, 6), (11, 2), (17, 3)])
@pytest.mark.parametrize("strips", [2, 3, 1000])
def test_strips_change_no_bit(autoencoder, size, strips):
    both = autoencoder()
    latents = mx.array(both.latents(*size))
    whole = decode(both.decoder, both.config, latents, strips=1)
    assert mx.array_equal(decode(both.decoder, both.config, latents, strips=strips), whole)


def test_the_halo_is_the_receptive_field(autoencoder, monkeypatch):
    """A NaN in one row of the tail's input spreads to just the rows of output that depend on it."""
    both = autoencoder()
    tail = both.decoder.tail
    channels = both.config.decoder_dims[-4]
    x = np.zeros((1, 60, 2, channels), np.float32)
    x[:, 30] = np.nan
    x = mx.array(x)
    for stage in tail:
        x = stage(x)
    touched = np.flatnonzero(np.isnan(np.array(x)).any(axis=(0, 2, 3)))
    assert both.decoder.tail_halo == first_vae.BAND
    scale = both.decoder.tail_scale
    assert scale * (30 - first_vae.BAND) <= touched[0] < touched[-1] < scale * (31 + first_vae.BAND)
    assert touched[0] < scale * (30 - first_vae.BAND + 1)


def plain_shapes(component, config):
    return {spec.name: spec.shape for spec in expected_tensors(component_of(component), config).values()}


REAL = {
    "transformer": (TRANSFORMER, TransformerConfig(), 297),
    "vae": (VAE, VAEConfig(), 238),
}
NETWORKS = [
    (TRANSFORMER, "main", TransformerConfig(), Transformer),
    (TRANSFORMER, "modulation", TransformerConfig(), TimeModulation),
    (VAE, "encoder", VAEConfig(), Encoder),
    (VAE, "decoder", VAEConfig(), Decoder),
]


@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_the_real_checkpoints_is_stated(name):
    component, config, count = REAL[name]
    stated = plain_shapes(component, config)
    assert len(stated) == count
    assert stated == full_size_meta_21(name)


@pytest.mark.parametrize(("component", "part", "config", "build"), NETWORKS, ids=lambda value: str(value)[:20])
def test_full_size_modules_have_exactly_the_map_s_parameters(component, part, config, build):
    before = mx.get_active_memory()
    found = {name: tuple(array.shape) for name, array in tree_flatten(build(config).parameters())}
    assert found == {
        spec.name: tuple(LAYOUTS[spec.layout](mx.zeros(spec.shape)).shape)
        for spec in expected_tensors(component_of(component), config).values()
        if spec.part == part
    }
    assert mx.get_active_memory() - before < 10e6, "nothing may be evaluated"
