"""Names other programs give the released tensors, at full size, lead back to them; and files of other kinds do not."""

from __future__ import annotations

import re
from pathlib import Path

import foreign_names
import mlx.core as mx
import pytest

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.weights.gguf import GgufTensor
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import (
    canonical_names,
    dialect_of,
    expected_tensors,
    is_ignored,
    known_share,
    settings_of_names,
)
from qwen_image_mlx.weights.recognize import foreign_format, kinds_of, part_of
from qwen_image_mlx.weights.safetensors_files import Tensor, read_header
from qwen_image_mlx.weights.snapshot import read_tensors, weight_file
from qwen_image_mlx.weights.synthetic import FULL, ROWS, TINY, random_values

NAMES = {component: list(expected_tensors(ROWS[component], FULL[component])) for component in FULL}
SPELLINGS = {
    ("vae", "Wan"): foreign_names.wan_name,
    ("transformer", "mflux"): foreign_names.mflux_transformer_name,
    ("text_encoder", "mflux"): foreign_names.mflux_text_name,
    ("vision", "mflux"): foreign_names.mflux_text_name,
    ("transformer", "ComfyUI"): lambda name: f"model.diffusion_model.{name}",
    ("transformer", "Swift single file"): lambda name: (
        re.sub(r"_mod\.1\.", "_mod.", name).replace("net.0.proj.", "proj_in.").replace("_mlp.net.2.", "_mlp.proj_out.")
    ),
    ("vision", "mlx-vlm"): lambda name: name.replace("visual.", "vision_tower.", 1),
    ("text_encoder", "llama.cpp"): foreign_names.llama_name,
    ("text_encoder", "bare"): lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize(("component", "dialect"), SPELLINGS)
def test_full_size_names_lead_back(component, dialect):
    spelled = {SPELLINGS[component, dialect](name): name for name in NAMES[component]}
    assert len(spelled) == len(NAMES[component])
    assert canonical_names(ROWS[component], spelled) == spelled
    assert dialect_of(ROWS[component], spelled) == dialect
    assert known_share(ROWS[component], spelled) == 1


@pytest.mark.reference
def test_full_size_names_of_mflux_s_autoencoder_lead_back():
    import foreign
    import torch

    shapes = {spec.name: spec.shape for spec in expected_tensors(ROWS["vae"], FULL["vae"]).values()}
    written = foreign.mflux_vae({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    found = canonical_names(ROWS["vae"], written)
    assert set(shapes) - set(found.values()) == {
        f"encoder.down_blocks.5.time_conv.{word}" for word in ("weight", "bias")
    }
    for stored, name in found.items():
        assert sorted(written[stored].shape) == sorted(d for d in shapes[name] if not name.endswith("gamma") or d > 1)


@pytest.mark.reference
@pytest.mark.parametrize("form", ["released", "Wan", "mflux"])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_smallest_convolutions_are_not_mistaken_for_each_other(tmp_path, form, channels):
    """With 3 channels, the first convolution looks the same in both layouts."""
    import foreign
    import numpy as np
    import torch
    from mlx.utils import tree_flatten

    from qwen_image_mlx.models.qwen_image.vae import Decoder, Encoder

    config = VAEConfig(base_dim=TINY["vae"].base_dim, input_channels=channels)
    specs = expected_tensors(ROWS["vae"], config)
    keys = mx.random.split(mx.random.key(0), len(specs))
    tensors = {n: torch.from_numpy(np.array(random_values(s, keys[i]))) for i, (n, s) in enumerate(specs.items())}
    spelled = {"released": lambda t: t, "Wan": lambda t: {foreign_names.wan_name(n): v for n, v in t.items()},
               "mflux": foreign.mflux_vae}[form](tensors)  # fmt: skip
    modules = []
    for written in (tensors, spelled):
        file = foreign.save(tmp_path / f"{len(modules)}.safetensors", written)
        weights = ComponentWeights(ROWS["vae"], config, weight_file(file).tensors, ("encoder", "decoder"))
        modules.append([load_module(c(config), weights, p, mx.float32) for c, p in ((Encoder, "encoder"), (Decoder, "decoder"))])  # fmt: skip  # noqa: E501
    for one, other in zip(*modules, strict=True):
        pairs = zip(tree_flatten(one.parameters()), tree_flatten(other.parameters()), strict=True)
        assert all(name == twin and mx.array_equal(a, b) for (name, a), (twin, b) in pairs)


@pytest.mark.parametrize("prefix", foreign_names.PREFIXES)
def test_the_marker_of_2511_is_seen_under_every_prefix(prefix):
    names = [prefix + name for name in (*NAMES["transformer"], "__index_timestep_zero__")]
    assert settings_of_names(ROWS["transformer"], names) == {"zero_cond_t": True}
    assert settings_of_names(ROWS["transformer"], names[:-1]) == {}


def test_what_says_nothing_is_passed_over():
    assert is_ignored(ROWS["text_encoder"], "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_ignored(ROWS["transformer"], "scaled_fp8")
    assert not is_ignored(ROWS["transformer"], "img_in.weight")
    assert not is_ignored(ROWS["vae"], "scaled_fp8")


def entries(names, dtype="F32", file="x.safetensors"):
    return {name: Tensor(name, dtype, (2, 2), Path(file), 16, 0) for name in names}


BUNDLES = {
    "Rapid-AIO": ("model.diffusion_model.", "text_encoders.qwen25_7b.transformer.", "vae."),
    "another encoder's name": ("model.diffusion_model.", "text_encoders.llm.", "vae."),
    "first stage": ("diffusion_model.", "cond_stage_model.qwen25_7b.transformer.", "first_stage_model."),
    "diffusers' folders": ("transformer.", "text_encoder.", "vae."),
    "compiled": ("model.diffusion_model._orig_mod.", "text_encoder._orig_mod.", "vae."),
}


@pytest.mark.parametrize("prefixes", BUNDLES.values(), ids=BUNDLES)
@pytest.mark.parametrize("wan", [True, False])
def test_each_part_of_an_all_in_one_file_is_found(prefixes, wan):
    names = {
        part: [foreign_names.wan_name(name) for name in NAMES[part]] if part == "vae" and wan else NAMES[part]
        for part in ("transformer", "text_encoder", "vae")
    }
    bundle = entries(prefix + name for prefix, part in zip(prefixes, names, strict=True) for name in names[part])
    bundle |= entries(["text_encoders.qwen25_7b.logit_scale", "text_encoders.clip_l.transformer.text_model.a.weight"])
    assert list(kinds_of(bundle)) == list(names)
    for part in names:
        found = part_of(part, bundle)
        assert set(found) == set(names[part])
        assert all(tensor.name.endswith(name) or "_orig_mod" in tensor.name for name, tensor in found.items())


def test_a_part_that_an_all_in_one_file_lacks_is_named():
    bundle = entries([f"model.diffusion_model.{n}" for n in NAMES["transformer"]] + [f"vae.{n}" for n in NAMES["vae"]])
    with pytest.raises(CheckpointError, match="all-in-one checkpoint with a transformer and an autoencoder, not"):
        part_of("text_encoder", bundle)


@pytest.mark.parametrize("wrap", [
    lambda n: f"_orig_mod.{n}", lambda n: f"module.{n}", lambda n: f"module._orig_mod.{n}",
    lambda n: re.sub(r"^(transformer_blocks\.\d+|model\.layers\.\d+)", r"\1._orig_mod", n),
])  # fmt: skip
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_wrappers_in_names_mean_nothing(part, wrap):
    found = part_of(part, entries(map(wrap, NAMES[part])))
    assert set(found) == set(NAMES[part])
    assert list(kinds_of(entries(map(wrap, NAMES[part])))) == [part]


Q = "transformer_blocks.{}.attn.to_q."
FORMATS = {
    "bitsandbytes nf4": {"weight": "U8", "weight.absmax": "U8", "weight.quant_state.bitsandbytes__nf4": "U8"},
    "bitsandbytes fp4": {"weight": "U8", "weight.absmax": "F32", "weight.quant_state.bitsandbytes__fp4": "U8"},
    "bitsandbytes int8": {"weight": "I8", "SCB": "F32", "weight_format": "U8"},
    "SVDQuant": {"qweight": "I8", "wscales": "BF16", "proj_down": "BF16", "proj_up": "BF16", "smooth_factor": "BF16"},
    "GPTQ": {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"},
    "AWQ": {"qweight": "I32", "qzeros": "I32", "scales": "F16"},
    "nvfp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "comfy_quant": "U8"},
    "compressed-tensors": {"weight_packed": "I32", "weight_scale": "BF16"},
    "HQQ": {"W_q": "U8", "scale": "F16", "zero": "F16"},
    "optimum-quanto": {"weight._data": "I8", "weight._scale": "BF16"},
    "SDNQ": {"weight": "U8", "scale": "F32", "zero_point": "F32"},
    "int8 without scales": {"weight": "I8"},
    "fp4": {"weight": "F4", "weight_scale": "F8_E8M0"},
    "mxfp8": {"weight": "F8_E4M3", "weight_scale": "F8_E8M0"},
    "fnuz": {"weight": "F8_E4M3FNUZ"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_quantizations_that_are_not_read_are_called_by_name(name, component):
    path = {"transformer": "transformer_blocks.{}.attn.to_q.", "text_encoder": "model.layers.{}.self_attn.q_proj."}
    tensors = entries(NAMES[component], "BF16")
    for layer in range(3):
        base = path[component].format(layer)
        del tensors[f"{base}weight"]
        for word, dtype in FORMATS[name].items():
            tensors |= entries([base + word], dtype)
    with pytest.raises(CheckpointError, match=name) as caught:
        ComponentWeights(ROWS[component], FULL[component], tensors, ("main",))
    assert "download" not in str(caught.value)
    assert "use a bf16" in str(caught.value)
    assert list(kinds_of(tensors)) == [component]
    assert foreign_format(entries(NAMES[component], "F8_E4M3")) is None


@pytest.mark.parametrize("dtype", ["IQ4_XS", "MXFP4", "TQ1_0"])
def test_types_of_gguf_that_are_not_read_are_called_by_name(dtype):
    name = Q.format(0) + "weight"
    tensors = {**entries(NAMES["transformer"]), name: GgufTensor(name, dtype, (2, 2), Path("x.gguf"), 16, 0)}
    with pytest.raises(CheckpointError, match=f"GGUF's {dtype}"):
        ComponentWeights(ROWS["transformer"], FULL["transformer"], tensors, ("main",))


def test_a_single_shard_is_told_from_a_file_that_does_not_fit():
    names = NAMES["transformer"][: len(NAMES["transformer"]) // 3]
    file = "diffusion_pytorch_model-00001-of-00009.safetensors"
    with pytest.raises(CheckpointError, match="shard 1 of 9, so give the folder"):
        ComponentWeights(ROWS["transformer"], FULL["transformer"], entries(names, file=file), ("main",))


@pytest.mark.parametrize(("start", "says"), [
    (b"GGUF" + bytes(20), "GGUF file"), (b"PK\x03\x04" + bytes(20), "zip file"), (b"\x80\x02}q" + bytes(20), "pickle"),
    (b"<!DOCTYPE html><html>", "web page"), (b"\n<html>" + bytes(9), "web page"), (b'{"error": "no"}  ', "JSON"),
])  # fmt: skip
def test_files_of_other_kinds_are_not_called_damaged(tmp_path, start, says):
    file = tmp_path / "model.safetensors"
    file.write_bytes(start)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(file)
    assert "download it again" not in str(caught.value)


@pytest.mark.reference
@pytest.mark.parametrize(("names", "says"), [
    (["single_transformer_blocks.0.proj_out.weight"], "FLUX"),
    (["transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA, .*as a LoRA"),
    (["some.other.weight"], "something else"),
    (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    (["blk.0.attn_q.weight", "token_embd.weight"], "a text encoder"),
    (["blocks.0.cross_attn.q.weight"], "Wan"),
])  # fmt: skip
def test_other_models_are_named(tmp_path, names, says):
    import foreign
    import torch

    file = foreign.save(tmp_path / "other.safetensors", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(CheckpointError, match=says):
        ComponentWeights(ROWS["transformer"], FULL["transformer"], read_tensors([file]), ("main",))
