"""How many kernels the transformer asks of a GPU at its real size, and that sharing them out changes no number."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from graphs import kernels, primitives
from mlx.utils import tree_map

from qwen_image_mlx.lora.branch import SideBranch
from qwen_image_mlx.models import layers
from qwen_image_mlx.models.layers import (
    Linear,
    QuantizedLinear,
    attention,
    gated_add,
    gelu_tanh,
    periods,
    rotate_half,
    turns,
)
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.rope import Segment, rotary_tables
from qwen_image_mlx.models.qwen_image.transformer import BlockRows, Modulation, Transformer, TransformerBlock
from qwen_image_mlx.models.rotary import Rotary, rotate

DTYPES = [mx.bfloat16, mx.float16, mx.float32]


def made(*shape, dtype=mx.bfloat16):
    array = mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)
    mx.eval(array)
    return array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2])
def test_gelu_and_gate_are_one_kernel_each(dtype, terms):
    x, gate, *rest = made(1, 64, 96, dtype=dtype), made(96, dtype=dtype), made(96, dtype=dtype)
    sums = [x, *rest][:terms]
    assert len(kernels(gelu_tanh(*sums))) == 1
    assert len(kernels(gated_add(x, gate, *sums))) == 1
    if terms == 2:  # added in the next kernel, a bias has the bits it has by itself
        assert mx.array_equal(gelu_tanh(*sums), gelu_tanh(sums[0] + sums[1]))
        assert mx.array_equal(gated_add(x, gate, *sums), gated_add(x, gate, sums[0] + sums[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_is_one_kernel(dtype):
    tables = rotary_tables([Segment(0, 8, 8)], 7, (16, 56, 56))
    halves = turns(mx.arange(71 * 64).reshape(71, 1, 64) / 100, axis=-2)
    mx.eval(tables, halves)
    x = made(1, 71, 24, 128, dtype=dtype)
    for turned in (rotate(x, *tables), rotate_half(x, *halves)):
        assert turned.dtype == dtype
        assert len(kernels(turned)) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_turns_pairs_as_complex_numbers(dtype):
    x = made(1, 12, 3, 32, dtype=dtype)
    angles = np.random.default_rng(0).uniform(-9, 9, (12, 1, 16)).astype(np.float32)
    wide = np.array(x.astype(mx.float32)).astype(np.float64)
    error = {mx.bfloat16: 2**-7, mx.float16: 2**-10, mx.float32: 2**-21}[dtype]
    for axis, rotary in ((-1, rotate), (-2, rotate_half)):
        pairs = np.moveaxis(wide.reshape(1, 12, 3, *((16, 2) if axis == -1 else (2, 16))), axis, 0)
        turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles.astype(np.float64))
        expected = np.stack([turned.real, turned.imag], axis=axis).reshape(wide.shape)
        ours = np.array(rotary(x, *turns(mx.array(angles), axis)).astype(mx.float32))
        np.testing.assert_allclose(ours, expected, atol=2 * error, rtol=error)


@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 16), (10000.0, 56), (10000.0, 40), (1e6, 128)])
def test_rotary_periods_are_the_host_s(theta, dim):
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    expected = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(np.array(periods(theta, dim)), expected)
    assert "Power" not in primitives(periods(theta, dim))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_terms_add_up_to_a_layer_s_output(quantized, branch, bias):
    layer = Linear(64, 96, bias)
    layer.weight = made(96, 64, dtype=mx.float32)
    if bias:
        layer.bias = made(96, dtype=mx.float32)
    if quantized:
        layer = QuantizedLinear(*mx.quantize(layer.weight, 32, 8), 32, 8, "affine", layer.get("bias"))
    if branch:
        layer = SideBranch(layer, made(4, 64, dtype=mx.float32), made(96, 4, dtype=mx.float32))
    x = made(1, 5, 64, dtype=mx.float32)
    terms = layer.terms(x)
    assert len(terms) == (2 if quantized and bias else 1)
    np.testing.assert_allclose(np.array(sum(terms)), np.array(layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [64, 200, 517])
@pytest.mark.parametrize("rows", [64, 128, 512])
def test_splitting_queries_changes_numbers_by_rounding_alone(monkeypatch, tokens, rows):
    q, k, v = (made(1, n, 3, 32, dtype=mx.float32) for n in (tokens, 300, 300))
    whole = attention(q, k, v)
    monkeypatch.setattr(layers, "ATTENTION_FLOP", 4 * 3 * 32 * 300 * rows)
    split = attention(q, k, v)
    assert len(primitives(split)) > len(primitives(whole)) or tokens <= rows
    np.testing.assert_allclose(np.array(split), np.array(whole), atol=1e-6)


@pytest.mark.parametrize("tokens", [4296, 7089, 9600, 16600, 65700])
def test_no_attention_kernel_takes_more_than_its_share(tokens, monkeypatch):
    rows, flops = [], []

    def note(q, k, v, scale):
        rows.append(q.shape[2])
        flops.append(4 * q.size * k.shape[2])
        return q

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", note)
    q = mx.zeros((1, tokens, 24, 128), mx.bfloat16)
    assert attention(q, q, q).shape == (1, tokens, 3072)
    assert sum(rows) == tokens
    assert all(count % 64 == 0 for count in rows[:-1])
    assert max(flops) <= layers.ATTENTION_FLOP
    assert len(flops) <= 1.2 * sum(flops) / layers.ATTENTION_FLOP + 1


# At real size, without an evaluation ----------------------------------------------------------------------------------


def lazily(module):
    module.update(tree_map(lambda array: mx.zeros(array.shape, mx.bfloat16), module.parameters()))
    return module


def zeros(*shape):
    return mx.zeros(shape, mx.bfloat16)


def inputs(target, text):
    tokens, images = target + text, [zeros(1, target, 3072)]
    tables = Rotary(mx.zeros((tokens, 1, 64, 2)), mx.zeros((tokens, 1, 64, 2)))
    rows = [zeros(3072) for _ in range(6)]
    return images, zeros(1, text, 3072), BlockRows(rows, rows, rows), tables


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Norms and attention as one primitive each; on a CPU they are up to twenty."""
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, *_: mx.ceil(x))
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.ceil(x))
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, scale: mx.concatenate([q, k, v], axis=2)[:, :, : q.shape[2]],
    )


@pytest.fixture(scope="module")
def block():
    return lazily(TransformerBlock(TransformerConfig(), last=False))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_quantized_block_adds_its_biases_in_the_kernels_after():
    """Of twelve biases six are added by GELU and gates; those of q, k and v come before a norm or a copy."""
    config = TransformerConfig()
    packed = lazily(TransformerBlock(config, last=False))
    for path, layer in packed.named_modules():
        if isinstance(layer, Linear):
            out, width = layer.weight.shape
            form = mx.zeros((out, width // 8), mx.uint32), zeros(out, width // 64), zeros(out, width // 64)
            parent, _, name = path.rpartition(".")
            module = packed
            for word in parent.split("."):
                module = module[int(word)] if word.isdigit() else module[word]
            place = int(name) if name.isdigit() else name
            module[place] = QuantizedLinear(*form, 64, 4, "affine", layer.bias)
    images, text, rows, tables = inputs(4096, 200)
    names = Counter(kernels(packed(images, text, rows, tables)))
    assert names["QuantizedMatmul"] == 12
    assert names["Add"] == 6


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_has_half_the_operations_it_had(block):
    """37,314 for a guided step of 60 blocks, when rows were unpacked in each block and both passes were interleaved."""
    model = Transformer(TransformerConfig(num_layers=1))
    model.transformer_blocks = [block] * 60
    lazily(model.img_in), lazily(model.proj_out)
    *_, rows, _ = inputs(64, 8)
    texts = [zeros(1, length, 3072) for length in (200, 20)]
    tables = [Rotary(*(mx.zeros((4096 + text.shape[1], 1, 64, 2)) for _ in range(2))) for text in texts]
    modulation = Modulation([rows] * 60, rows.text[:2])
    velocities = model.velocities(zeros(1, 4096, 64), texts, modulation, tables)
    names = primitives(velocities)
    assert len(names) - names.count("Full") <= 37_314 / 2
    assert "Depends" not in names
