"""The transformer against diffusers' QwenImageTransformer2DModel, live, in fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import TINY
from mlx.utils import tree_flatten, tree_map
from reference import make_transformer, to_numpy

from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.rope import Segment, rotary_tables, text_start
from qwen_image_mlx.models.qwen_image.transformer import Modulation, Transformer
from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import ROWS

pytestmark = pytest.mark.reference

TOLERANCE = 2e-5
GRIDS = [(4, 6), (7, 5), (1, 1), (16, 9)]  # height and width in patches, odd ones included
CONFIGS = {
    "tiny": {},
    "one block": {"num_layers": 1},
    "four blocks": {"num_layers": 4, "num_attention_heads": 2},
    "zero_cond_t": {"zero_cond_t": True},
}


def relative(ours: mx.array, theirs: torch.Tensor) -> float:
    theirs = to_numpy(theirs)
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())


class Pair:
    """The same random weights in both implementations."""

    def __init__(self, folder, overrides, dtype=mx.float32):
        config = {**TINY["transformer"], **overrides}
        self.theirs = make_transformer(config)
        self.theirs.save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        self.config = TransformerConfig.from_dict({k: v for k, v in config.items() if not k.startswith("_")})
        tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
        self.weights = ComponentWeights(ROWS["transformer"], self.config, tensors, ["main", "modulation"])
        self.ours = load_module(Transformer(self.config), self.weights, "main", dtype)

    def inputs(self, grid, length, seed=0):
        rng = np.random.default_rng(seed)
        latents = rng.standard_normal((1, grid[0] * grid[1], self.config.in_channels), np.float32)
        text = 3 * rng.standard_normal((1, length, self.config.joint_attention_dim), np.float32)
        return latents, text

    def reference(self, latents, text, grid, timestep):
        with torch.no_grad():
            return self.theirs(
                hidden_states=torch.from_numpy(latents),
                encoder_hidden_states=torch.from_numpy(text),
                timestep=torch.tensor([timestep]),
                img_shapes=[[(1, *grid)]],
                return_dict=False,
            )[0]

    def velocity(self, latents, text, grid, timestep, dtype=mx.float32):
        table = modulation_table(self.weights, [timestep], dtype)
        rotary = rotary_tables([Segment(0, *grid)], text.shape[1], self.config.axes_dims_rope)
        projected = self.ours.project_text(mx.array(text).astype(dtype))
        return self.ours(mx.array(latents).astype(dtype), projected, table[0], rotary)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Pair(tmp_path_factory.mktemp("transformer"), CONFIGS[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_velocity_equals_the_reference(pair, name, grid):
    both = pair(name)
    latents, text = both.inputs(grid, length=7)
    expected = both.reference(latents, text, grid, 0.73)
    assert relative(both.velocity(latents, text, grid, 0.73), expected) < TOLERANCE


@pytest.mark.parametrize("timestep", [1.0, 0.5, 0.02, 0.0])
def test_timestep_reaches_the_result_as_in_the_reference(pair, timestep):
    both = pair("tiny")
    latents, text = both.inputs((4, 4), length=3)
    ours = both.velocity(latents, text, (4, 4), timestep)
    assert relative(ours, both.reference(latents, text, (4, 4), timestep)) < TOLERANCE
    assert relative(ours, both.reference(latents, text, (4, 4), (timestep + 0.3) % 1.2)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "four blocks", "zero_cond_t", "one block"])
@pytest.mark.parametrize("references", [[(4, 6)], [(3, 5), (8, 2)], [(2, 2), (6, 6), (1, 9)]], ids=len)
def test_references_equal_the_reference(pair, name, references):
    both, grid = pair(name), (4, 5)
    latents, text = both.inputs(grid, length=6)
    given = np.concatenate([both.inputs(g, 1, seed=n + 5)[0] for n, g in enumerate(references)], axis=1)
    with torch.no_grad():
        expected = both.theirs(
            hidden_states=torch.from_numpy(np.concatenate([latents, given], axis=1)),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.tensor([0.4]),
            img_shapes=[[(1, *g) for g in (grid, *references)]],
            return_dict=False,
        )[0][:, : latents.shape[1]]
    segments = [Segment(n, *g) for n, g in enumerate((grid, *references))]
    table = modulation_table(both.weights, [0.4], mx.float32, both.config.zero_cond_t)
    ours = both.ours(
        mx.array(latents),
        both.ours.project_text(mx.array(text)),
        table[0],
        rotary_tables(segments, 6, both.config.axes_dims_rope),
        both.ours.project_references(mx.array(given)),
    )
    assert relative(ours, expected) < TOLERANCE


@pytest.mark.parametrize("length", [1, 5, 40])
def test_any_prompt_length(pair, length):
    both = pair("tiny")
    latents, text = both.inputs((6, 4), length=length, seed=length)
    assert relative(both.velocity(latents, text, (6, 4), 0.9), both.reference(latents, text, (6, 4), 0.9)) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_stay_in_the_dtype_of_the_model(tmp_path, dtype):
    """One stray fp32 array would turn the whole stream into fp32."""
    both = Pair(tmp_path, {}, dtype)
    table = modulation_table(both.weights, [0.5], dtype)
    assert {array.dtype for _, array in tree_flatten(table)} == {dtype}
    assert {array.dtype for _, array in tree_flatten(both.ours.parameters())} == {dtype}
    latents, text = both.inputs((4, 4), length=3)
    img = both.ours.img_in(mx.array(latents).astype(dtype))
    txt = both.ours.project_text(mx.array(text).astype(dtype))
    rotary = rotary_tables([Segment(0, 4, 4)], 3, both.config.axes_dims_rope)
    for block, rows in zip(both.ours.transformer_blocks, table[0].blocks, strict=True):
        (img,), txt = block([img], txt, rows, rotary)
        assert (img.dtype, txt.dtype) == (dtype, dtype)
    assert both.velocity(latents, text, (4, 4), 0.5, dtype).dtype == dtype


def test_a_forward_pass_never_waits_for_a_result(pair):
    """Inside mx.compile any evaluation raises: a whole step can be traced, so it holds no host sync.

    The result is not evaluated, which would compile kernels for seconds.
    """
    both = pair("tiny")
    latents, text = both.inputs((4, 4), length=3)
    rows = modulation_table(both.weights, [0.5], mx.float32)[0]
    rotary = rotary_tables([Segment(0, 4, 4)], 3, both.config.axes_dims_rope)

    def step(x, txt, blocks, out, real, imag):
        return both.ours(x, txt, Modulation(blocks, out), (real, imag))

    arguments = (mx.array(latents), both.ours.project_text(mx.array(text)), rows.blocks, rows.out, *rotary)
    assert mx.compile(step)(*arguments).shape == step(*arguments).shape


def test_the_last_block_has_no_weights_for_the_text_nobody_reads(pair):
    names = dict(tree_flatten(pair("tiny").ours.parameters()))
    first, last = ({n for n in names if n.startswith(f"transformer_blocks.{i}.")} for i in (0, 1))
    gone = {n.replace(".0.", ".1.", 1) for n in first} - last
    assert {n.split(".")[2] + "." + n.split(".")[3] for n in gone} == {
        "txt_mlp.net", "attn.add_q_proj", "attn.to_add_out", "attn.norm_added_q",
    }  # fmt: skip


def test_modulation_is_not_resident(pair):
    assert not [n for n, _ in tree_flatten(pair("tiny").ours.parameters()) if "_mod" in n or "norm_out" in n]


def test_a_table_of_many_steps_holds_the_rows_of_each_alone(pair):
    both = pair("tiny")
    steps = [1.0, 0.7, 0.31, 0.02]
    table = modulation_table(both.weights, steps, mx.float32)
    for number, step in enumerate(steps):
        (alone,) = modulation_table(both.weights, [step], mx.float32)
        same = tree_map(lambda a, b: mx.abs(a - b).max().item() < 1e-5, table[number], alone)
        assert all(value for _, value in tree_flatten(same))


def test_float16_streams_are_held_inside_their_range(tmp_path):
    both = Pair(tmp_path, {}, mx.float16)
    latents, text = both.inputs((4, 4), length=3)
    rows = modulation_table(both.weights, [0.5], mx.float16)[0]
    huge = tree_map(lambda row: mx.full(row.shape, 60000.0, dtype=mx.float16), rows.blocks[0])
    rotary = rotary_tables([Segment(0, 4, 4)], 3, both.config.axes_dims_rope)
    text = both.ours.project_text(mx.array(text).astype(mx.float16))
    (img,), txt = both.ours.transformer_blocks[0](
        [both.ours.img_in(mx.array(latents).astype(mx.float16))], text, huge, rotary
    )
    assert not mx.isinf(img).any().item()
    assert not mx.isinf(txt).any().item()


def angles_of(rotary):
    """cos and sin (tokens, head_dim / 2)."""
    cos, sin = np.moveaxis(np.array(rotary.real)[:, 0], -1, 0)
    np.testing.assert_array_equal(np.array(rotary.imag)[:, 0], np.stack([-sin, cos], axis=-1))
    return cos, sin


def test_positions_are_those_of_the_reference_tables():
    """Goldens: an image of 3x2 patches has rows -2, -1, 0 and columns -1, 0; its text starts at 1."""
    assert text_start([Segment(0, 3, 2)]) == 1
    cos, sin = angles_of(rotary_tables([Segment(0, 3, 2)], 2, (2, 2, 2)))
    angles = np.arctan2(sin, cos)  # one frequency of 1 per axis: the angle is the position
    rows = [(0, r, c) for r in (-2, -1, 0) for c in (-1, 0)]
    np.testing.assert_allclose(angles, [(1, 1, 1), (2, 2, 2), *rows], atol=1e-6)


def test_positions_of_references_turn_the_frame_axis():
    segments = [Segment(0, 2, 2), Segment(1, 2, 4), Segment(2, 6, 2)]
    assert text_start(segments) == 3
    cos, sin = angles_of(rotary_tables(segments, 1, (2, 2, 2)))
    frames = np.arctan2(sin, cos)[1:, 0]
    np.testing.assert_allclose(frames, [0] * 4 + [1] * 8 + [2] * 12, atol=1e-6)
