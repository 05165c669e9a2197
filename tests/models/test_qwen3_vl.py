"""The language model and the vision tower of Qwen3-VL against transformers' classes, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import merged
from checkpoints_21 import REAL_TEXT_ENCODER, SMALL_TEXT_ENCODER
from mlx.utils import tree_flatten
from reference import to_numpy
from reference_21 import full_size_meta_21, make_text_encoder_21

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.models.qwen3_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen3_vl.text import LanguageHead, Prompt, TextEncoder, mrope_tables
from qwen_image_mlx.models.qwen3_vl.vision import VisionTower
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import LAYOUTS, canonical_names, dialect_name, expected_tensors, other_part
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header

pytestmark = pytest.mark.reference

LANGUAGE = "Qwen3VLForConditionalGeneration"
HEAD, VISION = f"{LANGUAGE}.language_head", f"{LANGUAGE}.vision"
SMALL = SMALL_TEXT_ENCODER


class Both:
    """The same random model in both implementations."""

    def __init__(self, folder, config):
        whole = make_text_encoder_21(config)
        whole.save_pretrained(folder)
        self.theirs, file = whole.model, folder / "model.safetensors"
        self.tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
        self.text, self.vision = TextEncoderConfig.from_dict(config), VisionConfig.from_dict(config)

    def encoder(self, dtype=mx.float32):
        weights = ComponentWeights(component_of(LANGUAGE), self.text, self.tensors, ["main"])
        return load_module(TextEncoder(self.text), weights, "main", dtype)

    def tower(self, dtype=mx.float32):
        weights = ComponentWeights(component_of(VISION), self.vision, self.tensors, ["main"])
        return load_module(VisionTower(self.vision), weights, "main", dtype)


CONFIGS = {
    "tiny": SMALL,
    "all heads": merged(SMALL, {"text_config": {"num_key_value_heads": 6}, "vision_config": {"num_heads": 4}}),
    "deep": merged(SMALL, {"vision_config": {"deepstack_visual_indexes": [0, 1, 3]}}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    return Both(tmp_path_factory.mktemp("text_encoder"), CONFIGS[request.param])


def relative(ours, theirs):
    theirs = to_numpy(theirs)
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())


def reference_states(both, ids, positions, slots=None, additions=()):
    """States before the final norm, and after it."""
    language, kept = both.theirs.language_model, []
    handle = language.norm.register_forward_hook(lambda _module, given, _output: kept.append(given[0]))
    with torch.no_grad():
        normed = language(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions)[:, None],
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            visual_pos_masks=None if slots is None else torch.from_numpy(slots)[None],
            deepstack_visual_embeds=[torch.from_numpy(a) for a in additions] or None,
        ).last_hidden_state
    handle.remove()
    return kept[0], normed


@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_states_equal_the_reference_before_and_after_the_norm(both, length):
    ids = np.random.default_rng(length).integers(0, 300, (1, length))
    positions = np.broadcast_to(np.arange(length), (3, length)).copy()
    encoder = both.encoder()
    (ours,) = encoder.together([Prompt(encoder.embed(mx.array(ids)), mx.array(positions))])
    before, after = reference_states(both, ids, positions)
    assert relative(ours, before) < 1e-5
    assert relative(encoder.normed(ours), after) < 1e-5


def test_three_position_axes_and_additions_equal_the_reference(both):
    rng = np.random.default_rng(1)
    ids, positions = rng.integers(0, 300, (1, 24)), rng.integers(0, 40, (3, 24))
    slots = np.isin(np.arange(24), range(5, 17))
    added = [rng.standard_normal((12, both.text.hidden_size), np.float32) for _ in range(3)]
    dense = [np.zeros((1, 24, both.text.hidden_size), np.float32) for _ in added]
    for whole, part in zip(dense, added, strict=True):
        whole[0, slots] = part
    encoder = both.encoder()
    embeddings, placed = encoder.embed(mx.array(ids)), [mx.array(whole) for whole in dense]
    ours, swapped, without = encoder.together(
        [
            Prompt(embeddings, mx.array(positions), placed),
            Prompt(embeddings, mx.array(positions[[0, 2, 1]]), placed),
            Prompt(embeddings, mx.array(positions), placed[:2]),
        ]
    )
    expected = reference_states(both, ids, positions, slots, added)[0]
    assert relative(ours, expected) < 1e-5
    assert relative(swapped, expected) > 1e-3
    assert relative(without, expected) > 1e-3


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (10, 6), (2, 40), (18, 34)])
def test_features_and_taps_equal_the_reference(both, grid):
    config, (height, width) = both.vision, grid
    shape = (height * width, config.in_channels, 1, config.patch_size, config.patch_size)
    patches = np.random.default_rng(0).standard_normal(shape, np.float32)
    twice = np.repeat(patches, config.temporal_patch_size, axis=2).reshape(len(patches), -1)
    with torch.no_grad():
        expected = both.theirs.visual(torch.from_numpy(twice), grid_thw=torch.tensor([[1, *grid]]))
    ours = both.tower()(mx.array(patches.reshape(len(patches), -1)), *grid)
    assert relative(ours.merged, expected.pooler_output) < 1e-5
    assert len(ours.taps) == len(expected.deepstack_features) == len(config.deepstack_visual_indexes)
    for tap, theirs in zip(ours.taps, expected.deepstack_features, strict=True):
        assert relative(tap, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_stay_in_the_dtype_of_the_model(both, dtype):
    encoder, tower, made = both.encoder(dtype), both.tower(dtype), []
    for network in (encoder, tower):
        assert {array.dtype for _, array in tree_flatten(network.parameters())} == {dtype}
    encoder.together([Prompt(encoder.embed(mx.array([[1, 2, 3]])), mx.zeros((3, 3)))], on_layer=made.extend)
    features = tower(mx.zeros((8, both.vision.patch_pixels)).astype(dtype), 2, 4, on_layer=made.extend)
    assert {array.dtype for array in (*made, features.merged, *features.taps)} == {dtype}
    assert {table.dtype for table in mrope_tables(mx.zeros((3, 3)), (4, 2, 2), 16, 1e6, dtype)} == {dtype}


def test_a_pass_never_waits_for_a_result(both):
    """Inside mx.compile any evaluation raises. The result is not evaluated, which would compile kernels for seconds."""
    encoder, tower = both.encoder(), both.tower()
    patches = mx.random.normal((24, both.vision.patch_pixels), key=mx.random.key(0))

    def states(ids):
        return encoder.together([Prompt(encoder.embed(ids), mx.broadcast_to(mx.arange(4), (3, 4)))])[0]

    ids = mx.array([[5, 6, 7, 8]])
    assert mx.compile(states)(ids).shape == states(ids).shape
    assert mx.compile(lambda x: tower(x, 4, 6).merged)(patches).shape == tower(patches, 4, 6).merged.shape


REAL_TEXT, REAL_VISION = TextEncoderConfig.from_dict(REAL_TEXT_ENCODER), VisionConfig.from_dict(REAL_TEXT_ENCODER)
NETWORKS = {
    LANGUAGE: (REAL_TEXT, TextEncoder),
    HEAD: (REAL_TEXT, LanguageHead),
    VISION: (REAL_VISION, VisionTower),
}


def test_every_tensor_of_the_real_checkpoint_is_stated_once():
    stated = [
        (spec.name, spec.shape)
        for component, (config, _) in NETWORKS.items()
        for spec in expected_tensors(component_of(component), config).values()
    ]
    assert len(stated) == len(dict(stated))
    assert dict(stated) == full_size_meta_21("text_encoder")
    assert (TextEncoderConfig(), VisionConfig()) == (REAL_TEXT, REAL_VISION)


@pytest.mark.parametrize("component", NETWORKS)
def test_full_size_modules_have_exactly_the_map_s_parameters(component):
    config, build = NETWORKS[component]
    before = mx.get_active_memory()
    found = {name: tuple(array.shape) for name, array in tree_flatten(build(config).parameters())}
    assert found == {
        spec.name: tuple(LAYOUTS[spec.layout](mx.zeros(spec.shape)).shape)
        for spec in expected_tensors(component_of(component), config).values()
    }
    assert mx.get_active_memory() - before < 10e6, "nothing may be evaluated"


@pytest.mark.parametrize("dialect", ["released", "flat", "bare", "mlx-vlm"])
def test_every_spelling_is_understood(dialect):
    """Each component knows its own tensors and those of the others, under every name."""
    parts = {LANGUAGE: "language", HEAD: "head", VISION: "vision"}
    names = {n: part for c, part in parts.items() for n in expected_tensors(component_of(c), NETWORKS[c][0])}
    for component, own in parts.items():
        spelled = [dialect_name(component_of(component), dialect, name) for name in names]
        assert canonical_names(component_of(component), spelled) == dict(zip(spelled, names, strict=True))
        for name, part in names.items():
            assert other_part(component_of(component), name) == (None if part == own else part), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type"),
        ({"text_config": {"rope_scaling": {"mrope_section": [4, 4, 4]}}}, "mrope_section"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"num_key_value_heads": 4}}, "num_key_value_heads"),
        ({"vision_config": {"deepstack_visual_indexes": [2, 4]}}, "deepstack_visual_indexes"),
        ({"vision_config": {"num_position_embeddings": 35}}, "position embeddings"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act"),
    ],
)
def test_impossible_configs_are_refused(changes, said):
    config = merged(SMALL, changes)
    with pytest.raises(CheckpointError, match=said):
        TextEncoderConfig.from_dict(config), VisionConfig.from_dict(config)
