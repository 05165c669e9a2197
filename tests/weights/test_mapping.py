"""The weights map against the reference classes at full size, both ways, and against our own modules."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
import torch
from checkpoints import REAL_CONFIGS, TINY
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from reference import full_size_meta, rename_text_encoder_keys
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen2_5_vl.text import TextEncoder
from qwen_image_mlx.models.qwen2_5_vl.vision import VisionTower
from qwen_image_mlx.models.qwen_image.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image.transformer import Transformer
from qwen_image_mlx.models.qwen_image.vae import Decoder, Encoder
from qwen_image_mlx.weights.mapping import (
    LAYOUTS,
    canonical_names,
    dialect_name,
    expected_tensors,
    other_part,
    weights_map,
)
from qwen_image_mlx.weights.safetensors_files import read_header
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.reference


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
MODULES = {
    **{name: (component, "main", config, Transformer) for name, (component, config) in REAL.items() if "tr" in name},
    "text_encoder": ("text_encoder", "main", TEXT, TextEncoder),
    "vision": ("vision", "main", VISION, VisionTower),
    **{f"{name} {build.__name__}": ("vae", build.__name__.lower(), REAL[name][1], build)
       for name in ("vae", "vae-rgba") for build in (Encoder, Decoder)},
}  # fmt: skip


def shapes(component, config):
    """What the map states, by name in the released files."""
    return {spec.name: spec.shape for spec in expected_tensors(ROWS[component], config).values()}


def reference_shapes(build, *args, **fields):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build(*args, **fields).named_parameters()}


@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_the_real_checkpoints_is_stated(name):
    assert shapes(*REAL[name]) == full_size_meta(name)


def test_text_encoder_and_vision_tower_cover_the_text_encoder_but_its_head():
    language, vision = shapes("text_encoder", TEXT), shapes("vision", VISION)
    real = full_size_meta("text_encoder")
    assert not language.keys() & vision.keys()
    assert language | vision == {name: shape for name, shape in real.items() if name != "lm_head.weight"}
    for name in real:
        part = "vision" if name in vision else "language" if name in language else "head"
        assert other_part(ROWS["text_encoder"], name) == (None if part == "language" else part), name
        assert other_part(ROWS["vision"], name) == (None if part == "vision" else part), name


@pytest.mark.parametrize("name", MODULES)
def test_full_size_modules_have_exactly_the_map_s_parameters(name):
    component, part, config, build = MODULES[name]
    before = mx.get_active_memory()
    found = {name: tuple(array.shape) for name, array in tree_flatten(build(config).parameters())}
    stated = {
        spec.name: tuple(LAYOUTS[spec.layout](mx.zeros(spec.shape)).shape)
        for spec in expected_tensors(ROWS[component], config).values()
        if spec.part == part
    }
    assert found == stated
    assert mx.get_active_memory() - before < 10e6, "nothing may be evaluated"


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vision", "vae"])
def test_every_dialect_leads_to_the_canonical_names_and_back(component):
    config = {"text_encoder": TEXT, "vision": VISION}.get(component) or REAL[component][1]
    names = list(expected_tensors(ROWS[component], config))
    for dialect in weights_map(ROWS[component].map)["dialects"]:
        spelled = [dialect_name(component, dialect, name) for name in names]
        assert len(set(spelled)) == len(names)
        assert list(canonical_names(ROWS[component], spelled).values()) == names


@pytest.fixture(scope="module")
def respelled(tiny, tmp_path_factory):
    """(a copy of the tiny checkpoint to respell, what the checkpoint makes of a prompt)."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("respelled") / "model")
    return folder, QwenImagePipeline.from_pretrained(tiny, dtype="float32").encode_guidance_prompts("a fox").positive


@pytest.mark.parametrize("spelling", ["official", "nested", "bare"])
def test_every_spelling_of_the_text_encoder_is_recognised(respelled, spelling):
    folder = rename_text_encoder_keys(respelled[0], spelling) / "text_encoder"
    config = json.loads((folder / "config.json").read_text())
    stored = [name for file in folder.glob("*.safetensors") for name in read_header(file)[0]]
    language = shapes("text_encoder", TextEncoderConfig.from_dict(config))
    vision = shapes("vision", VisionConfig.from_dict(config))
    for component in ("text_encoder", "vision"):
        assert {*canonical_names(ROWS[component], stored).values()} == {*language, *vision, "lm_head.weight"}


@pytest.mark.parametrize("spelling", ["official", "nested", "bare"])
@pytest.mark.parametrize("config", ["flat", "nested", "both"])
def test_text_encoders_of_every_spelling_encode_alike(respelled, spelling, config):
    folder, expected = respelled
    rename_text_encoder_keys(folder, spelling, config=config)
    state = QwenImagePipeline.from_pretrained(folder, dtype="float32").encode_guidance_prompts("a fox").positive
    assert mx.array_equal(state, expected)


@pytest.mark.parametrize(("language", "vision", "head"), [
    ("model.", "visual.", "lm_head."),
    ("model.language_model.", "model.visual.", "lm_head."),
    ("language_model.", "visual.", "lm_head."),
    ("language_model.model.", "visual.", "language_model.lm_head."),
])  # fmt: skip
def test_spellings_in_the_wild_lead_to_the_canonical_names(language, vision, head):
    prefixes = {"model": language, "visual": vision, "lm_head": head}
    split = {name: name.partition(".") for name in full_size_meta("text_encoder")}
    spelled = {prefixes[first] + rest: name for name, (first, _, rest) in split.items()}
    for component in ("text_encoder", "vision"):
        assert canonical_names(ROWS[component], spelled) == spelled


@settings(deadline=None, max_examples=15)
@given(layers=st.integers(1, 3), heads=st.integers(1, 3), half=st.integers(1, 4), extra=st.booleans())
def test_small_transformers_are_stated_like_the_reference(layers, heads, half, extra):
    axes = (2 * half, 2 * half, 4)
    fields = {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": sum(axes), "axes_dims_rope": axes,
        "joint_attention_dim": 24, "use_additional_t_cond": extra,
    }  # fmt: skip
    stated = shapes("transformer", TransformerConfig.from_dict({**fields, "axes_dims_rope": [*axes]}))
    assert stated == reference_shapes(QwenImageTransformer2DModel, **fields)


LADDERS = [
    ([1, 2], [False]),
    ([1, 2, 4], [False, True]),
    ([1, 2, 2], [True, True]),
    ([1, 2, 4, 4], [False, True, True]),
]


@settings(deadline=None, max_examples=10)
@given(
    base=st.integers(1, 3), blocks=st.integers(1, 3), ladder=st.sampled_from(LADDERS), channels=st.sampled_from([3, 4])
)
def test_small_autoencoders_are_stated_like_the_reference(base, blocks, ladder, channels):
    fields = {
        "base_dim": 8 * base, "num_res_blocks": blocks, "dim_mult": ladder[0], "temperal_downsample": ladder[1],
        "input_channels": channels,
    }  # fmt: skip
    assert shapes("vae", VAEConfig.from_dict(fields)) == reference_shapes(AutoencoderKLQwenImage, **fields)


@settings(deadline=None, max_examples=5)
@given(layers=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), depth=st.integers(2, 4), width=st.integers(1, 3))
def test_small_text_encoders_are_stated_like_the_reference(layers, groups, depth, width):
    tiny = TINY["text_encoder"]
    vision = tiny["vision_config"] | {"depth": depth, "hidden_size": 32 * width}
    config = tiny | {"num_hidden_layers": layers, "num_key_value_heads": groups, "vocab_size": 300}
    config |= {"max_window_layers": layers, "vision_config": vision}
    theirs = reference_shapes(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig.from_dict(config))
    theirs = {name: theirs[stored] for stored, name in canonical_names(ROWS["text_encoder"], theirs).items()}
    ours = shapes("text_encoder", TextEncoderConfig.from_dict(config))
    ours |= shapes("vision", VisionConfig.from_dict(config))
    assert ours | {"lm_head.weight": (300, 64)} == theirs
