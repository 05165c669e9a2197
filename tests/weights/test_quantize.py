"""Quantization: better than MLX's own at equal size, exact in what is stored, and the same from words and back."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_loader import CONFIG, Memory, nbytes, weights, write

from qwen_image_mlx import Quantization
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.models.layers import Linear, QuantizedEmbedding, QuantizedLinear
from qwen_image_mlx.models.qwen_image.transformer import Transformer
from qwen_image_mlx.weights.loader import load_module
from qwen_image_mlx.weights.packed import Packed
from qwen_image_mlx.weights.quantize import quantize_matrix, relative_error
from qwen_image_mlx.weights.schemes import SCHEMES, Scheme

EVERY = [Scheme(mode, bits, group) for mode, bits, groups in SCHEMES.values() for group in groups]
W = mx.random.normal((96, 512), key=mx.random.key(0))
HEAVY = W * mx.exp(0.7 * mx.random.normal(W.shape, key=mx.random.key(1)))


def by_mlx(w: mx.array, scheme: Scheme) -> Packed:
    packed = mx.quantize(w.astype(mx.bfloat16), scheme.group_size, scheme.bits, scheme.mode)
    return Packed(*packed, *([None] if len(packed) == 2 else []), scheme.group_size, scheme.bits, scheme.mode)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
@pytest.mark.parametrize("w", [W, HEAVY], ids=["gaussian", "heavy-tailed"])
def test_errors_are_at_most_those_of_mlx(w, scheme):
    ours, theirs = relative_error(w, quantize_matrix(w, scheme)), relative_error(w, by_mlx(w, scheme))
    assert ours < (0.985 * theirs if scheme.mode == "affine" else 1.01 * theirs)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_what_is_packed_is_what_mlx_unpacks(scheme):
    """The bit stream in numpy, against `mx.dequantize`."""
    packed = quantize_matrix(W, scheme)
    if scheme.mode != "affine":
        theirs = mx.quantize(W, scheme.group_size, scheme.bits, scheme.mode)
        assert all(mx.array_equal(a, b) for a, b in zip(packed.arrays, theirs, strict=False))
        return
    bits = np.unpackbits(np.array(packed.weight).view(np.uint8), axis=1, bitorder="little")
    q = (bits.reshape(96, 512, scheme.bits) << np.arange(scheme.bits)).sum(axis=-1).reshape(96, -1, scheme.group_size)
    scales, biases = (np.array(a.astype(mx.float32))[..., None] for a in (packed.scales, packed.biases))
    np.testing.assert_allclose(
        np.array(packed.dequantize()), (scales * q + biases).reshape(96, 512), rtol=1e-5, atol=1e-6
    )
    assert packed.shape == W.shape
    assert packed.scales.dtype == mx.bfloat16


@pytest.mark.parametrize("w", [mx.zeros((4, 64)), mx.full((4, 64), 3.0), mx.full((4, 64), -1e-30), 1e4 * W[:4, :64]])
def test_constant_tiny_and_large_groups(w):
    assert relative_error(w, quantize_matrix(w, Scheme.parse(8))) < 0.01


def test_every_refit_helps_or_changes_nothing():
    scheme = Scheme.parse(4)
    errors = [relative_error(HEAVY, quantize_matrix(HEAVY, scheme, refits)) for refits in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[6] < 0.95 * errors[0]


def test_bands_change_nothing(monkeypatch):
    from qwen_image_mlx.weights import quantize

    whole = quantize_matrix(W, Scheme.parse(5))
    monkeypatch.setattr(quantize, "_BAND", 7 * 512)
    assert all(
        mx.array_equal(a, b) for a, b in zip(whole.arrays, quantize_matrix(W, Scheme.parse(5)).arrays, strict=True)
    )


@pytest.mark.parametrize(("text", "group", "said"), [
    ("4", None, "transformer=4,text_encoder=8"),
    (8, 32, "transformer=8/32,text_encoder=8/32"),
    ("nvfp4", 16, "transformer=nvfp4,text_encoder=8"),
    ("mxfp4", None, "transformer=mxfp4,text_encoder=8"),
    ("transformer=4, vision=none", None, "transformer=4"),
    ("transformer=5/128,text_encoder=mxfp8,vision=6", None, "transformer=5/128,text_encoder=mxfp8,vision=6"),
    ("none", None, "none"),
])  # fmt: skip
def test_words_and_back(text, group, said):
    quantization = Quantization.parse(text, group)
    assert str(quantization) == said
    assert Quantization.parse(said) == quantization


@pytest.mark.parametrize(("text", "group", "says"), [
    ("7", None, "'7' is not a quantization"), ("", None, "not a quantization"), ("4", 48, "32 or 128, not of 48"),
    ("4/32", 64, "of its own"), ("mxfp4", 64, "groups of 32"), ("transformer=4,transformer=8", None, "once: write"),
    ("vae=4", None, "transformer=4"), ("transformer=4/x", None, "not of x"),
    ("transformer", None, "not a quantization"),
])  # fmt: skip
def test_other_words_are_refused(text, group, says):
    with pytest.raises(RequestError, match=says):
        Quantization.parse(text, group)


def quantized(module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.slow
def test_the_policy_and_what_does_not_fit(tmp_path, caplog):
    headers, _ = write(tmp_path)
    model = load_module(Transformer(CONFIG), weights(headers), "main", mx.float32, Scheme.parse(4))
    names = quantized(model)
    assert len(names) == 12 * CONFIG.num_layers - 4  # the last block has no text output
    assert all(name.startswith("transformer_blocks.") for name in names)
    for name in ("img_in", "txt_in", "proj_out"):
        assert type(model[name]) is Linear
    assert not caplog.records
    odd = replace(CONFIG, num_attention_heads=3)  # 96 wide
    headers, _ = write(tmp_path, config=odd)
    model = load_module(Transformer(odd), weights(headers, odd), "main", mx.float32, Scheme.parse(4))
    (record,) = caplog.records
    assert "not multiples of 64" in record.getMessage()
    assert quantized(model) == {f"transformer_blocks.{n}.{s}_mlp.net.2" for n in range(6) for s in ("img", "txt")} - {
        "transformer_blocks.5.txt_mlp.net.2"
    }


@pytest.mark.slow
def test_the_peak_of_quantizing_is_the_result_and_one_layer(tmp_path):
    source = weights(write(tmp_path)[0])
    memory = Memory()
    model = load_module(Transformer(CONFIG), source, "main", mx.bfloat16, Scheme.parse(4))
    resident, peak = memory.resident, memory.peak
    layer = sum(
        spec.shape[0] * spec.shape[1] for spec in source.specs("main") if "blocks.0." in spec.name and spec.quantized
    )
    largest = 4 * 4 * 256 * 256 * 4  # the biggest matrix in fp32, and what refitting it takes
    assert nbytes(model.parameters()) <= resident < 1.05 * nbytes(model.parameters()) + 1e5
    assert peak < resident + 4 * layer + 6 * largest


@pytest.mark.parametrize("scheme", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_quantized_layers_compute_what_their_matrices_say(scheme, dtype):
    packed = quantize_matrix(W, scheme).astype(dtype)
    x = mx.random.normal((3, 512), key=mx.random.key(2)).astype(dtype)
    bias = mx.random.normal((96,), key=mx.random.key(3)).astype(dtype)
    layer = QuantizedLinear(*packed.arrays, scheme.group_size, scheme.bits, scheme.mode, bias)
    out, expected = layer(x), x.astype(mx.float32) @ packed.dequantize().T + bias
    assert out.dtype == dtype
    error = mx.linalg.norm(out.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    assert error.item() < (1e-5 if dtype == mx.float32 else 0.05)  # MLX's CPU kernel adds up in bf16
    assert {name for name, _ in tree_flatten(layer.parameters())} <= {"weight", "scales", "biases", "bias"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("scheme", [Scheme.parse("8"), Scheme.parse("mxfp8")], ids=str)
def test_quantized_embeddings_are_rows(scheme, dtype):
    packed = quantize_matrix(W, scheme).astype(dtype)
    rows = QuantizedEmbedding(*packed.arrays, scheme.group_size, scheme.bits, scheme.mode, dtype)(mx.array([[5, 0]]))
    assert rows.dtype == dtype
    assert mx.abs(rows[0] - packed.dequantize()[mx.array([5, 0])]).max().item() < 0.05


@pytest.mark.parametrize(("text", "group", "beside"), [
    ("4/32", None, "8/32"), ("4", 32, "8/32"), ("4", None, "8"), ("4", 128, "8/128"), ("mxfp4", 32, "8"),
    ("8", None, "8"),
])  # fmt: skip
def test_the_text_encoder_takes_the_transformer_s_groups(text, group, beside):
    assert str(Quantization.parse(text, group).text_encoder) == beside


def test_a_group_size_is_not_left_open():
    with pytest.raises(RequestError, match="not a quantization"):
        Quantization.parse("4/")
