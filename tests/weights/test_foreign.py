"""Names other programs give the released tensors, at full size, lead back to them; and files of other kinds do not."""

from __future__ import annotations

import re

import foreign
import mlx.core as mx
import pytest

from qwen_image_mlx.config import VAEConfig
from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import (
    canonical_names,
    dialect_of,
    expected_tensors,
    is_ignored,
    known_share,
    shown_settings,
)
from qwen_image_mlx.weights.snapshot import read_tensors, weight_file
from qwen_image_mlx.weights.synthetic import FULL, TINY, random_values

NAMES = {component: list(expected_tensors(component, FULL[component])) for component in FULL}
SPELLINGS = {
    ("vae", "Wan"): foreign.wan_name,
    ("transformer", "mflux"): foreign.mflux_transformer_name,
    ("text_encoder", "mflux"): foreign.mflux_text_name,
    ("vision", "mflux"): foreign.mflux_text_name,
    ("transformer", "ComfyUI"): lambda name: f"model.diffusion_model.{name}",
    ("transformer", "Swift single file"): lambda name: (
        re.sub(r"_mod\.1\.", "_mod.", name).replace("net.0.proj.", "proj_in.").replace("_mlp.net.2.", "_mlp.proj_out.")
    ),
    ("vision", "mlx-vlm"): lambda name: name.replace("visual.", "vision_tower.", 1),
    ("text_encoder", "bare"): lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize(("component", "dialect"), SPELLINGS)
def test_full_size_names_lead_back(component, dialect):
    spelled = {SPELLINGS[component, dialect](name): name for name in NAMES[component]}
    assert len(spelled) == len(NAMES[component])
    assert canonical_names(component, spelled) == spelled
    assert dialect_of(component, spelled) == dialect
    assert known_share(component, spelled) == 1


def test_full_size_names_of_mflux_s_autoencoder_lead_back():
    import torch

    shapes = {spec.name: spec.shape for spec in expected_tensors("vae", FULL["vae"]).values()}
    written = foreign.mflux_vae({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    found = canonical_names("vae", written)
    assert set(shapes) - set(found.values()) == {
        f"encoder.down_blocks.5.time_conv.{word}" for word in ("weight", "bias")
    }
    for stored, name in found.items():
        assert sorted(written[stored].shape) == sorted(d for d in shapes[name] if not name.endswith("gamma") or d > 1)


@pytest.mark.parametrize("form", ["released", "Wan", "mflux"])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_smallest_convolutions_are_not_mistaken_for_each_other(tmp_path, form, channels):
    """With 3 channels, the first convolution looks the same in both layouts."""
    import numpy as np
    import torch
    from mlx.utils import tree_flatten

    from qwen_image_mlx.models.vae import Decoder, Encoder

    config = VAEConfig(base_dim=TINY["vae"].base_dim, input_channels=channels)
    specs = expected_tensors("vae", config)
    keys = mx.random.split(mx.random.key(0), len(specs))
    tensors = {n: torch.from_numpy(np.array(random_values(s, keys[i]))) for i, (n, s) in enumerate(specs.items())}
    spelled = {"released": lambda t: t, "Wan": lambda t: {foreign.wan_name(n): v for n, v in t.items()},
               "mflux": foreign.mflux_vae}[form](tensors)  # fmt: skip
    modules = []
    for written in (tensors, spelled):
        file = foreign.save(tmp_path / f"{len(modules)}.safetensors", written)
        weights = ComponentWeights("vae", config, weight_file(file).tensors, ("encoder", "decoder"))
        modules.append([load_module(c(config), weights, p, mx.float32) for c, p in ((Encoder, "encoder"), (Decoder, "decoder"))])  # fmt: skip  # noqa: E501
    for one, other in zip(*modules, strict=True):
        pairs = zip(tree_flatten(one.parameters()), tree_flatten(other.parameters()), strict=True)
        assert all(name == twin and mx.array_equal(a, b) for (name, a), (twin, b) in pairs)


@pytest.mark.parametrize("prefix", foreign.PREFIXES)
def test_the_marker_of_2511_is_seen_under_every_prefix(prefix):
    names = [prefix + name for name in (*NAMES["transformer"], "__index_timestep_zero__")]
    assert shown_settings("transformer", names) == {"zero_cond_t": True}
    assert shown_settings("transformer", names[:-1]) == {}


def test_what_says_nothing_is_passed_over():
    assert is_ignored("text_encoder", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_ignored("transformer", "scaled_fp8")
    assert not is_ignored("transformer", "img_in.weight")
    assert not is_ignored("vae", "scaled_fp8")


@pytest.mark.parametrize(("names", "says"), [
    (["single_transformer_blocks.0.proj_out.weight"], "FLUX"),
    (["transformer_blocks.0.attn.to_q.lora_A.weight"], "something else"),
    (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    (["blk.0.attn_q.weight", "token_embd.weight"], "something else"),
    (["blocks.0.cross_attn.q.weight"], "Wan"),
])  # fmt: skip
def test_other_models_are_named(tmp_path, names, says):
    import torch

    file = foreign.save(tmp_path / "other.safetensors", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(CheckpointError, match=says):
        ComponentWeights("transformer", FULL["transformer"], read_tensors([file]), ("main",))
