"""The language model against transformers' Qwen2.5-VL, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import TINY
from mlx.utils import tree_flatten
from reference import make_text_encoder, to_numpy

from qwen_image_mlx.models.qwen2_5_vl.config import TextEncoderConfig
from qwen_image_mlx.models.qwen2_5_vl.text import TextEncoder, mrope_tables
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.reference

SMALL = {**TINY["text_encoder"], "vocab_size": 300}


@pytest.fixture(scope="module", params=[{}, {"num_key_value_heads": 1}, {"num_hidden_layers": 4}], ids=str)
def both(request, tmp_path_factory):
    config = {**SMALL, **request.param}
    theirs = make_text_encoder(config)
    folder = tmp_path_factory.mktemp("text_encoder")
    theirs.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
    ours_config = TextEncoderConfig.from_dict(config)
    weights = ComponentWeights(ROWS["text_encoder"], ours_config, tensors, ["main"])

    def load(dtype=mx.float32):
        return load_module(TextEncoder(ours_config), weights, "main", dtype)

    return theirs, load


def states(model, ids, positions):
    return model(model.embed(ids), positions)


def reference_states(model, ids, positions):
    with torch.no_grad():
        out = model.model.language_model(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions)[:, None],
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
        )
    return to_numpy(out.last_hidden_state)


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_states_equal_the_reference(both, length):
    theirs, load = both
    ids = np.random.default_rng(length).integers(0, 300, (1, length))
    positions = np.broadcast_to(np.arange(length), (3, length)).copy()
    ours = np.array(states(load(), mx.array(ids), mx.array(positions)))
    expected = reference_states(theirs, ids, positions)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5


def test_three_position_axes_equal_the_reference(both):
    theirs, load = both
    rng = np.random.default_rng(1)
    ids, positions = rng.integers(0, 300, (1, 24)), rng.integers(0, 40, (3, 24))
    ours = np.array(states(load(), mx.array(ids), mx.array(positions)))
    expected = reference_states(theirs, ids, positions)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5
    swapped = np.array(states(load(), mx.array(ids), mx.array(positions[[0, 2, 1]])))
    assert np.abs(ours - swapped).max() > 1e-2


def test_a_token_never_sees_the_next(both):
    _, load = both
    model = load()
    ids = mx.array([[5, 6, 7, 8]])
    positions = mx.broadcast_to(mx.arange(4), (3, 4))
    changed = mx.array([[5, 6, 7, 250]])
    ours, other = states(model, ids, positions), states(model, changed, positions)
    assert mx.array_equal(ours[:, :3], other[:, :3])
    assert not mx.array_equal(ours[:, 3], other[:, 3])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_stay_in_the_dtype_of_the_model(both, dtype):
    _, load = both
    model = load(dtype)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {dtype}
    assert states(model, mx.array([[1, 2, 3]]), mx.broadcast_to(mx.arange(3), (3, 3))).dtype == dtype
    assert {t.dtype for t in mrope_tables(mx.zeros((3, 3)), (2, 3, 3), 16, 1e6, dtype)} == {dtype}
