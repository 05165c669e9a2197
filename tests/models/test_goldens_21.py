"""The networks of Qwen-Image-2.1 against the reference's numbers, which `tests/goldens` keeps: no torch is needed."""

from __future__ import annotations

import goldens
import mlx.core as mx
import numpy as np
import pytest
from checkpoints_21 import GRID, IMAGE_PLACES, NETWORKS, PATCHES, SLOTS, TIMES, golden_inputs, write_network_21
from mlx.utils import tree_flatten

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.models import causal
from qwen_image_mlx.models.causal import causal_attention
from qwen_image_mlx.models.qwen3_vl.text import LanguageHead, Prompt, TextEncoder, mrope_tables
from qwen_image_mlx.models.qwen3_vl.vision import VisionTower, position_weights
from qwen_image_mlx.models.qwen_image_21 import facts
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image_21.denoiser import Condition, Denoiser, Reference, check_positions, kept_values
from qwen_image_mlx.models.qwen_image_21.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image_21.rope import Run, last_position, lay_out, rotary_tables
from qwen_image_mlx.models.qwen_image_21.transformer import Transformer
from qwen_image_mlx.models.qwen_image_21.vae import Decoder, Encoder, fold, spread
from qwen_image_mlx.pipeline.autoencode import decode, encode_mode
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.text.places import image_starts
from qwen_image_mlx.text.prompt import TokenizedPrompt
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")

    def network(name, build, part="main"):
        component, config_class, config = NETWORKS[name]
        typed = config_class.from_dict(config)
        tensors = component_tensors([write_network_21(folder, name)], None)
        weights = ComponentWeights(component_of(component), typed, tensors, [part])
        return load_module(build(typed), weights, part, mx.float32), typed

    return network


@pytest.fixture(scope="module")
def given():
    return {name: mx.array(value) for name, value in golden_inputs().items()}


def test_transformer(load, given):
    (transformer, config), (modulation, _) = (
        load("transformer", Transformer),
        load("transformer", TimeModulation, "modulation"),
    )
    *table, still = modulation.table(mx.array([*TIMES, 0.0]), mx.float32)
    first = SLOTS[0][1] * SLOTS[0][2]
    latents = given["references"][:, :first], given["references"][:, first:]
    denoiser = Denoiser(
        transformer, config, table=table, still=still, grid=GRID, dtype=mx.float32,
        conditions=[Condition(given["states"], tuple(start for start, *_ in SLOTS))],
        references=[Reference(x, h, w) for x, (_, h, w) in zip(latents, SLOTS, strict=True)],
    )  # fmt: skip
    made = {f"velocity {step}": denoiser.velocities(given["noise"], step)[0] for step in range(len(TIMES))}
    goldens.assert_agree("transformer_21", made, 1e-4)


def test_autoencoder(load, given):
    (encoder, config), (decoder, _) = load("vae", Encoder, "encoder"), load("vae", Decoder, "decoder")
    made = {
        "pixels": decode(decoder, config, given["latents"]),
        "latents": encode_mode(encoder, config, given["pixels"]),
    }
    goldens.assert_agree("vae_21", made, 1e-4)


def test_text_encoder(load, given):
    (encoder, _), (head, _), (tower, _) = (
        load(name, build)
        for name, build in (("text_encoder", TextEncoder), ("language_head", LanguageHead), ("vision", VisionTower))
    )
    added = np.zeros((2, 20, 64), np.float32)
    added[:, IMAGE_PLACES] = np.array(given["additions"])
    (states,) = encoder.together(
        [Prompt(encoder.embed(given["ids"]), given["positions"], [mx.array(a)[None] for a in added])]
    )
    features = tower(given["patches"], *PATCHES)
    made = {"states": states, "scores": head(encoder.normed(states)), "features": features.merged}
    made |= {f"tap {n}": tap for n, tap in enumerate(features.taps)}
    goldens.assert_agree("text_encoder_21", made, 1e-4)


def angles_of(rotary):
    cos, sin = np.moveaxis(np.array(rotary.real)[:, 0], -1, 0)
    return np.arctan2(sin, cos)  # with one frequency of 1 per axis, the position


def test_positions_of_text_and_images():
    runs = [Run(2), Run.image(3, 2), Run(1)]
    image = [(2, r, c) for r in (-2, -1, 0) for c in (-1, 0)]
    expected = [(0, 0, 0), (1, 1, 1), *image, (5, 5, 5)]
    np.testing.assert_allclose(
        angles_of(rotary_tables(runs, (2, 2, 2))), np.angle(np.exp(1j * np.array(expected))), atol=1e-6
    )
    assert last_position(runs) == 5
    assert last_position([Run(4), Run.image(9, 9)]) == 4


def test_runs_of_a_prompt_with_images():
    assert lay_out(9, (), ()) == [Run(9)]
    assert lay_out(9, (2, 5), ((2, 2), (4, 4))) == [Run(2), Run.image(2, 2), Run(2), Run.image(4, 4)]
    assert lay_out(7, (0, 1), ((2, 2), (2, 4))) == [Run.image(2, 2), Run.image(2, 4), Run(4)]
    with pytest.raises(ValueError, match="inside those of the one before"):
        lay_out(9, (2, 3), ((4, 4), (2, 2)))
    with pytest.raises(ValueError, match="end at 10, but there are 9"):
        lay_out(9, (6,), ((4, 4),))


def test_what_has_no_positions_is_refused():
    check_positions([Run(8191)], (2048, 2))
    with pytest.raises(ValueError, match="8193 positions of 8192"):
        check_positions([Run(8192)], (2, 2))
    with pytest.raises(ValueError, match="2050 latents"):
        check_positions([Run(1)], (2, 2050))


def test_places_of_images_among_the_states():
    is_image = np.isin(np.arange(20), [6, 7, 8, 9, 10, 11, 15, 16])
    tokens = TokenizedPrompt(np.zeros(20, np.int32), is_image, np.zeros((3, 20), np.int32), 4)
    assert image_starts(tokens, [(2, 3), (1, 2)]) == (2, 11)
    assert image_starts(tokens, [(2, 2), (1, 2), (2, 1)]) == (2, 6, 11)


@pytest.mark.parametrize("length", [1, 5, 200])
def test_causal_attention_in_several_kernels_is_the_same(monkeypatch, length):
    draw = [mx.random.normal((1, n, h, 8), key=mx.random.key(n + h)) for n, h in ((length, 6), (230, 2), (230, 3))]
    q, k, v = draw[0], draw[1], mx.random.normal((1, 230, 2, 8), key=mx.random.key(1))
    scores = (q[0].transpose(1, 0, 2) @ mx.repeat(k[0], 3, axis=1).transpose(1, 2, 0)) * 8**-0.5
    hidden = mx.arange(230)[None] > mx.arange(230 - length, 230)[:, None]
    weights = mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1)
    expected = (weights @ mx.repeat(v[0], 3, axis=1).transpose(1, 0, 2)).transpose(1, 0, 2).reshape(1, length, -1)
    assert mx.allclose(causal_attention(q, k, v), expected, atol=1e-5)
    calls, attend = [], mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(causal, "ATTENTION_FLOP", 1.0)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *a, **o: calls.append(a) or attend(*a, **o))
    assert mx.allclose(causal_attention(q, k, v), expected, atol=1e-5)
    assert len(calls) == -(-length // 64)


def test_frequencies_take_turns_between_the_axes():
    tables = mrope_tables(mx.array([[1], [2], [3]]), (4, 2, 2), 16, 1.0, mx.float32)
    (cos, _), (minus_sin, _) = (np.array(table)[0, 0] for table in tables)
    angles = np.arctan2(-minus_sin, cos)
    np.testing.assert_allclose(angles, [1, 2, 3, 1, 2, 3, 1, 1], atol=1e-6)


def test_learned_positions_are_stretched_corner_on_corner():
    """The values of a plane are met exactly by interpolation between its points."""
    index, weights = (np.array(a) for a in position_weights(4, 6, 2, 3))
    plane = (10 * np.arange(3)[:, None] + np.arange(3)).reshape(-1)
    rows, columns = np.linspace(0, 2, 4), np.linspace(0, 2, 6)
    expected = (10 * rows[:, None] + columns).reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(-1)
    np.testing.assert_allclose((plane[index] * weights).sum(axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(position_weights(2, 2, 2, 3)[1]).sum(axis=1), 1)


def test_shortcuts_of_the_autoencoder():
    """With two frames, of which the first is empty, folding fills every second channel; spreading drops a frame."""
    x = mx.arange(2 * 2 * 3, dtype=mx.float32).reshape(1, 2, 2, 3)
    mean = np.array(x).mean(axis=(1, 2))[0]
    np.testing.assert_allclose(np.array(fold(x, 3, 1, 2))[0, 0, 0], mean)
    np.testing.assert_allclose(np.array(fold(x, 6, 2, 2))[0, 0, 0], np.stack([0 * mean, mean], axis=1).reshape(-1))
    assert mx.array_equal(fold(x, 3, 1, 1), x)
    one = mx.array([10.0, 20.0, 30.0, 40.0]).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(np.array(spread(one, 2, 2))[0], np.tile([[[20.0, 40.0]]], (2, 2, 1)))
    np.testing.assert_array_equal(np.array(spread(one, 2, 1))[0, :, 0], [[10.0, 30.0], [20.0, 40.0]])


def test_bytes_of_a_kept_prefix():
    """Of the released model in bf16: half a MiB for each token, so 2 GiB for a reference of 1024x1024."""
    assert 2 * kept_values(TransformerConfig(), 4096, 1) == 2 * 1024**3


def test_heads_of_the_vision_tower_fill_up_to_what_is_fused(load):
    tower, config = load("vision", VisionTower)
    assert (config.head_dim, tower.model.visual.blocks[0].attn._filling) == (72, 80)


def test_modulation_is_not_resident(load):
    transformer, _ = load("transformer", Transformer)
    assert not [
        n for n, _ in tree_flatten(transformer.parameters()) if n.startswith(("modulation", "time", "norm_out"))
    ]


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (TransformerConfig, {"patch_size": 2}, "patch_size"),
        (TransformerConfig, {"causal_condition": False}, "causal_condition"),
        (TransformerConfig, {"axes_dims_rope": [16, 56, 58]}, "axes_dims_rope"),
        (VAEConfig, {"is_residual": False}, "is_residual"),
        (VAEConfig, {"patch_size": 2}, "patch_size"),
        (VAEConfig, {"attn_scales": [1.0]}, "attn_scales"),
        (VAEConfig, {"z_dim": 16}, "latents_mean"),
        (VAEConfig, {"temperal_downsample": [True]}, "temperal_downsample"),
        (VAEConfig, {"dim_mult": [1, 2, 4, 8, 9]}, "down_blocks.4"),
    ],
)
def test_impossible_configs_are_refused(config, changes, said):
    with pytest.raises(CheckpointError, match=said):
        config.from_dict(changes)


def test_absent_values_of_configs():
    assert TransformerConfig.from_dict({"out_channels": None, "in_channels": 32}).out_channels == 32
    config = VAEConfig.from_dict({"decoder_base_dim": None, "patch_size": None, "scale_factor_spatial": 16})
    assert (config.decoder_base_dim, config.patch_size, config.spatial_factor) == (96, 1, 16)
    assert VAEConfig.from_dict({}) == VAEConfig()


@pytest.mark.parametrize("prompt", ["a fox", "a fox.", "a fox. ", "a fox..."])
def test_transparent_prompts_are_worded_once(prompt):
    worded = facts.transparent_prompt(prompt)
    assert worded == (
        "This is an RGBA image with transparency. a fox. The image has alpha channel and the background is transparent."
    )
    assert facts.transparent_prompt(worded) == worded


def test_official_sizes_are_multiples_of_the_step():
    for aspect, (width, height) in facts.ASPECT_SIZES.items():
        across, down = map(int, aspect.split(":"))
        assert width % facts.SIZE_MULTIPLE == height % facts.SIZE_MULTIPLE == 0
        assert abs(width / height / (across / down) - 1) < 0.02
        assert 0.98 < width * height / 2048**2 < 1.03
