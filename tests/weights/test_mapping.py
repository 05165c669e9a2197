"""The weights map against the reference classes at full size, both ways, and against our own modules."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from reference import REAL_CONFIGS, full_size_meta

from qwen_image_mlx.config import TextEncoderConfig, TransformerConfig, VAEConfig, VisionConfig
from qwen_image_mlx.models.text_encoder import TextEncoder
from qwen_image_mlx.models.transformer import Transformer
from qwen_image_mlx.models.vae import Decoder, Encoder
from qwen_image_mlx.models.vision import VisionTower
from qwen_image_mlx.weights.mapping import (
    LAYOUTS,
    canonical_names,
    dialect_name,
    expected_tensors,
    other_part,
    weights_map,
)


def plain(name):
    return {key: value for key, value in REAL_CONFIGS[name].items() if not key.startswith("_")}


REAL = {
    "transformer": ("transformer", TransformerConfig.from_dict(plain("transformer"))),
    "transformer-2511": ("transformer", TransformerConfig.from_dict(plain("transformer-2511"))),
    "transformer-layered": ("transformer", TransformerConfig.from_dict(plain("transformer-layered"))),
    "vae": ("vae", VAEConfig.from_dict(plain("vae"))),
    "vae-rgba": ("vae", VAEConfig.from_dict(plain("vae-rgba"))),
}
TEXT = TextEncoderConfig.from_dict(REAL_CONFIGS["text_encoder"])
VISION = VisionConfig.from_dict(REAL_CONFIGS["text_encoder"])
MODULES = [
    ("transformer", "main", REAL["transformer"][1], Transformer),
    ("text_encoder", "main", TEXT, TextEncoder),
    ("vision", "main", VISION, VisionTower),
    ("vae", "encoder", REAL["vae"][1], Encoder),
    ("vae", "decoder", REAL["vae"][1], Decoder),
]


@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_the_real_checkpoints_is_stated(name):
    component, config = REAL[name]
    stated = {spec.name: spec.shape for spec in expected_tensors(component, config).values()}
    assert stated == full_size_meta(name)


def test_text_encoder_and_vision_tower_cover_the_text_encoder_but_its_head():
    stated = {
        spec.name: spec.shape
        for component, config in (("text_encoder", TEXT), ("vision", VISION))
        for spec in expected_tensors(component, config).values()
    }
    real = full_size_meta("text_encoder")
    assert stated == {name: shape for name, shape in real.items() if name != "lm_head.weight"}
    assert other_part("text_encoder", "lm_head.weight") == "head"
    assert other_part("text_encoder", "visual.blocks.0.norm1.weight") == "vision"
    assert other_part("text_encoder", "model.norm.weight") is None


@pytest.mark.parametrize(("component", "part", "config", "build"), MODULES, ids=lambda v: v if type(v) is str else "")
def test_full_size_modules_have_exactly_the_map_s_parameters(component, part, config, build):
    before = mx.get_active_memory()
    module = build(config)
    found = {name: tuple(array.shape) for name, array in tree_flatten(module.parameters())}
    stated = {
        spec.name: tuple(LAYOUTS[spec.layout](mx.zeros(spec.shape)).shape)
        for spec in expected_tensors(component, config).values()
        if spec.part == part
    }
    assert found == stated
    assert mx.get_active_memory() - before < 10e6, "nothing may be evaluated"


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vision", "vae"])
def test_every_dialect_leads_to_the_canonical_names_and_back(component):
    config = {"text_encoder": TEXT, "vision": VISION}.get(component) or REAL[component][1]
    names = list(expected_tensors(component, config))
    for dialect in weights_map(component)["dialects"]:
        spelled = [dialect_name(component, dialect, name) for name in names]
        assert len(set(spelled)) == len(names)
        assert list(canonical_names(component, spelled).values()) == names


@pytest.mark.parametrize("spelling", ["official", "nested", "bare"])
@pytest.mark.parametrize("config", ["flat", "nested", "both"])
def test_text_encoders_of_every_spelling_encode_alike(tiny, tmp_path, spelling, config):
    import shutil

    from reference import rename_text_encoder_keys

    from qwen_image_mlx import QwenImagePipeline

    shutil.copytree(tiny, tmp_path / "model")
    rename_text_encoder_keys(tmp_path / "model", spelling, config=config)
    states = [
        QwenImagePipeline.from_pretrained(folder, dtype="float32").encode_guidance_prompts("a fox").positive
        for folder in (tiny, tmp_path / "model")
    ]
    assert mx.array_equal(*states)


@settings(deadline=None, max_examples=15)
@given(layers=st.integers(1, 3), heads=st.integers(1, 3), half=st.integers(1, 4), extra=st.booleans())
def test_small_transformers_are_stated_like_the_reference(layers, heads, half, extra):
    import torch
    from diffusers import QwenImageTransformer2DModel

    axes = [2 * half, 2 * half, 4]
    fields = {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": sum(axes), "axes_dims_rope": axes,
        "joint_attention_dim": 24, "use_additional_t_cond": extra,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel(**{**fields, "axes_dims_rope": tuple(axes)})
    stated = expected_tensors("transformer", TransformerConfig.from_dict(fields))
    assert {n: s.shape for n, s in stated.items()} == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


@settings(deadline=None, max_examples=10)
@given(base=st.integers(1, 3), blocks=st.integers(1, 3), mult=st.sampled_from([[1, 2], [1, 2, 4], [1, 2, 4, 4]]))
def test_small_autoencoders_are_stated_like_the_reference(base, blocks, mult):
    import torch
    from diffusers import AutoencoderKLQwenImage

    fields = {
        "base_dim": 8 * base, "num_res_blocks": blocks, "dim_mult": mult,
        "temperal_downsample": [False, True, True][: len(mult) - 1],
    }  # fmt: skip
    with torch.device("meta"):
        theirs = AutoencoderKLQwenImage(**fields)
    stated = expected_tensors("vae", VAEConfig.from_dict(fields))
    assert {n: s.shape for n, s in stated.items()} == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
