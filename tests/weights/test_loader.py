"""Loading: strict, complete, and without a peak."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.models.transformer import Transformer
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.mapping import LAYOUTS, UNUSED, expected_tensors
from qwen_image_mlx.weights.modulation import modulation_table
from qwen_image_mlx.weights.shards import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import TINY, random_values

CONFIG = replace(TINY["transformer"], num_layers=6, num_attention_heads=8)  # 256 wide: 1 MB per big matrix


def write(folder, change=lambda tensors: None, config=CONFIG):
    """(weights, tensors) of a file with every tensor of the config, after `change`."""
    specs = list(expected_tensors("transformer", config).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    tensors = {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)}
    change(tensors)
    file = folder / "weights.safetensors"
    mx.save_safetensors(str(file), tensors)
    headers = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
    return headers, tensors


def weights(headers, config=CONFIG, parts=("main", "modulation")):
    return ComponentWeights("transformer", config, headers, parts)


def test_every_parameter_gets_its_weight(tmp_path):
    headers, tensors = write(tmp_path)
    model = load_module(Transformer(CONFIG), weights(headers), "main", mx.float32)
    specs = expected_tensors("transformer", CONFIG)
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, LAYOUTS[specs[name].layout](tensors[name])), name


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["img_in.weight"]
        tensors["stranger.weight"] = mx.ones((2,))
        tensors["txt_in.bias"] = mx.ones((5,))
        tensors["proj_out.bias"] = mx.ones(tensors["proj_out.bias"].shape, mx.int32)

    headers, _ = write(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        weights(headers)
    for said in ("img_in.weight", "stranger.weight", "txt_in.bias [5] instead of [256]", "proj_out.bias (I32)"):
        assert said in str(error.value)


def test_what_no_picture_needs_is_neither_read_nor_missed(tmp_path):
    unused = [spec.name for spec in expected_tensors("transformer", CONFIG).values() if spec.part == UNUSED]
    assert any("txt_mlp" in name for name in unused)
    for change in (
        lambda tensors: tensors.update({name: mx.full(tensors[name].shape, mx.nan) for name in unused}),
        lambda tensors: [tensors.pop(name) for name in unused],
    ):
        headers, _ = write(tmp_path, change)
        model = load_module(Transformer(CONFIG), weights(headers), "main", mx.float32)
        assert all(mx.isfinite(array).all().item() for _, array in tree_flatten(model.parameters()))


def test_a_part_can_be_had_without_the_others(tmp_path):
    headers, _ = write(tmp_path, lambda tensors: tensors.pop("norm_out.linear.weight"))
    load_module(Transformer(CONFIG), weights(headers, parts=["main"]), "main", mx.float32)
    with pytest.raises(CheckpointError, match=r"norm_out\.linear\.weight"):
        weights(headers)


def test_the_peak_of_loading_is_the_result_and_one_layer(tmp_path):
    headers, _ = write(tmp_path)
    source = weights(headers)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_module(Transformer(CONFIG), source, "main", mx.bfloat16)
    resident = mx.get_active_memory() - before
    peak = mx.get_peak_memory() - before
    block = sum(a.nbytes for _, a in tree_flatten(model.transformer_blocks[0].parameters()))
    assert resident < 1.02 * sum(a.nbytes for _, a in tree_flatten(model.parameters())) + 1e5
    assert peak < resident + 3.2 * block, "the block being cast stands there in fp32 too"
    assert peak < 0.75 * 3 * resident, "the whole in fp32 beside the result would be three times the result"


def test_the_modulation_is_streamed(tmp_path):
    headers, tensors = write(tmp_path)
    source = weights(headers)
    total = sum(a.nbytes for name, a in tensors.items() if "_mod." in name)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    del tensors
    table = modulation_table(source, [1.0, 0.5], mx.float32)
    size = sum(a.nbytes for _, a in tree_flatten(table))
    assert mx.get_peak_memory() - before < 0.4 * total
    assert mx.get_active_memory() - before < 3 * size


def test_the_table_is_what_the_weights_say(tmp_path):
    """temb through one weight, in numpy."""
    headers, tensors = write(tmp_path)
    t = {name: np.array(a) for name, a in tensors.items()}

    def silu(x):
        return x / (1 + np.exp(-x))

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    angles = 1000 * 0.3 * np.exp(-np.log(10000) * np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)])
    time = "time_text_embed.timestep_embedder.linear_"
    embedding = silu(linear(f"{time}2", silu(linear(f"{time}1", features))))
    (step,) = modulation_table(weights(headers), [0.3], mx.float32)
    rows = linear("transformer_blocks.3.img_mod.1", embedding).reshape(6, -1)
    rows[[1, 4]] += 1
    np.testing.assert_allclose(np.array(step.blocks[3].target), rows, atol=1e-4)
    scale, shift = linear("norm_out.linear", embedding).reshape(2, -1)
    np.testing.assert_allclose(np.array(step.out), [scale + 1, shift], atol=1e-4)
    assert step.blocks[3].references.tolist() == step.blocks[3].target.tolist()


def test_a_file_that_vanishes_while_loading_is_a_clear_error(tmp_path):
    headers, _ = write(tmp_path)
    source = weights(headers)
    next(iter(source.files)).unlink()
    with pytest.raises(CheckpointError, match="transformer"):
        load_module(Transformer(CONFIG), source, "main", mx.float32)


def test_loading_leaves_the_application_s_random_numbers_alone(tmp_path):
    headers, _ = write(tmp_path)
    mx.random.seed(9)
    expected = mx.random.normal((4,))
    mx.random.seed(9)
    load_module(Transformer(CONFIG), weights(headers), "main", mx.float32)
    assert mx.array_equal(mx.random.normal((4,)), expected)
