"""The vision tower against transformers' Qwen2.5-VL, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import TINY
from mlx.utils import tree_flatten
from reference import make_text_encoder, to_numpy

from qwen_image_mlx.models.qwen2_5_vl.config import VisionConfig
from qwen_image_mlx.models.qwen2_5_vl.vision import VisionTower, window_index
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.reference

# Height and width in patches: one window, border windows on either side, a single cell, exact multiples of a window.
GRIDS = [(8, 8), (10, 6), (2, 2), (16, 24), (18, 34), (2, 40)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    config = {**TINY["text_encoder"], "vocab_size": 300}
    theirs = make_text_encoder(config)
    folder = tmp_path_factory.mktemp("vision")
    theirs.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
    vision = VisionConfig.from_dict(config)
    weights = ComponentWeights(ROWS["vision"], vision, tensors, ["main"])
    return (
        theirs.model.visual,
        lambda dtype=mx.float32: load_module(VisionTower(vision), weights, "main", dtype),
        vision,
    )


def random_patches(config, grid, seed=0):
    shape = (grid[0] * grid[1], config.in_channels, 1, config.patch_size, config.patch_size)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def features(tower, patches, grid):
    return tower(patches.reshape(patches.shape[0], -1), *grid)


def relative(ours, theirs):
    theirs = to_numpy(theirs)
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("grid", GRIDS)
def test_features_equal_the_reference(both, grid):
    theirs, load, config = both
    patches = random_patches(config, grid)
    twice = np.repeat(patches, config.temporal_patch_size, axis=2).reshape(len(patches), -1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(twice), grid_thw=torch.tensor([[1, *grid]])).pooler_output
    assert relative(features(load(), mx.array(patches), grid), expected) < 1e-5


def test_images_of_a_batch_never_see_each_other(both):
    """The reference runs all images in one sequence; here each is a call of its own."""
    theirs, load, config = both
    tower, grids = load(), [(10, 6), (4, 12)]
    patches = [random_patches(config, grid, seed) for seed, grid in enumerate(grids)]
    joined = np.repeat(np.concatenate(patches), config.temporal_patch_size, axis=2)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(joined.reshape(len(joined), -1)), grid_thw=torch.tensor([[1, *g] for g in grids])
        ).pooler_output
    ours = mx.concatenate([features(tower, mx.array(p), g) for p, g in zip(patches, grids, strict=True)])
    assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (1, 1), (9, 17), (8, 4)])
def test_windows_hold_every_patch_once(height, width):
    members, mask, slots = window_index(height, width, side=4, per_cell=4, dtype=mx.float32)
    members, mask, slots = np.array(members), np.array(mask)[:, 0, 0], np.array(slots)
    kept = members[mask == 0]
    assert sorted(kept) == list(range(height * width * 4))
    np.testing.assert_array_equal(members.reshape(-1)[slots], np.arange(height * width * 4))
    for window, valid in zip(members, mask == 0, strict=True):
        cells = window[valid] // 4
        assert len({(c // width // 4, c % width // 4) for c in cells}) == 1


def test_a_forward_pass_never_waits_for_a_result(both):
    """Inside mx.compile any evaluation raises. The result is not evaluated, which would compile kernels for seconds."""
    _, load, config = both
    tower, grid = load(), (10, 6)
    patches = mx.array(random_patches(config, grid)).reshape(60, -1)
    assert mx.compile(lambda x: tower(x, *grid))(patches).shape == tower(patches, *grid).shape


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_stay_in_the_dtype_of_the_model(both, dtype):
    _, load, config = both
    tower = load(dtype)
    assert {array.dtype for _, array in tree_flatten(tower.parameters())} == {dtype}
    patches = mx.array(random_patches(config, (4, 4))).astype(dtype)
    assert features(tower, patches, (4, 4)).dtype == dtype
