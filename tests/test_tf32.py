"""TF32, which MLX uses for fp32 products on an M5: off unless asked for, before MLX could read the variable."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.models.qwen_image.vae import Decoder
from qwen_image_mlx.pipeline.autoencode import decode

VARIABLE = "MLX_ENABLE_TF32"
# Prints the variable when MLX is about to be imported, and ends.
_WATCH = f"""
import os, runpy, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "mlx":
            print(os.environ.get({VARIABLE!r}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
_BY_SCRIPT = """
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="qwen-image-mlx")
"""
_WAYS = {
    "import": "import qwen_image_mlx; qwen_image_mlx.QwenImagePipeline",
    "module": "sys.argv = ['x', 'info', 'demo']; runpy.run_module('qwen_image_mlx', run_name='__main__')",
    "script": f"{_BY_SCRIPT}sys.argv = ['x', 'generate', 'x', '--model', 'demo']; script.load()()",
    "a room": "import qwen_image_mlx.models.autoencoder",
}


@pytest.mark.process
@pytest.mark.parametrize("said", [None, "1", "0"])
@pytest.mark.parametrize("way", _WAYS)
def test_the_variable_is_set_before_mlx_and_an_own_value_stays(way, said, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if said is not None:
        environment[VARIABLE] = said
    done = subprocess.run(
        [sys.executable, "-c", _WATCH + _WAYS[way]], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{said or '0'}\n", ""), done


# --- what it would do to an image -----------------------------------------------------------------------------------

# Winograd's F(6x6, 3x3) as MLX's Metal backend has it (mlx/backend/metal/kernels/conv.metal): eight points.
_INPUT = mx.array([
    [1, 0, -5.25, 0, 5.25, 0, -1, 0],
    [0, 1, 1, -4.25, -4.25, 1, 1, 0],
    [0, -1, 1, 4.25, -4.25, -1, 1, 0],
    [0, 0.5, 0.25, -2.5, -1.25, 2, 1, 0],
    [0, -0.5, 0.25, 2.5, -1.25, -2, 1, 0],
    [0, 2, 4, -2.5, -5, 0.5, 1, 0],
    [0, -2, 4, 2.5, -5, -0.5, 1, 0],
    [0, -1, 0, 5.25, 0, -5.25, 0, 1],
])  # fmt: skip
_KERNEL = mx.array([
    [1, 0, 0], [-2 / 9, -2 / 9, -2 / 9], [-2 / 9, 2 / 9, -2 / 9], [1 / 90, 1 / 45, 2 / 45], [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45], [32 / 45, -16 / 45, 8 / 45], [0, 0, 1],
])  # fmt: skip
_OUTPUT = mx.array([
    [1, 1, 1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0.5, -0.5, 0],
    [0, 1, 1, 4, 4, 0.25, 0.25, 0],
    [0, 1, -1, 8, -8, 0.125, -0.125, 0],
    [0, 1, 1, 16, 16, 0.0625, 0.0625, 0],
    [0, 1, -1, 32, -32, 0.03125, -0.03125, 1],
])  # fmt: skip
_CONTRAST = 0.69  # of the last convolution: few values are then black or white
_TILE = 6  # rows and columns of output

Rounding = Callable[[mx.array], mx.array]


def exact(x: mx.array) -> mx.array:
    """fp32 as it is."""
    return x


def tf32(x: mx.array) -> mx.array:
    """fp32 rounded to TF32's 10 bits of mantissa, to nearest even."""
    bits = x.astype(mx.float32).view(mx.uint32)
    return ((bits + ((bits >> 13) & 1) + 0xFFF) & 0xFFFFE000).view(mx.float32)


def winograd(x: mx.array, weight: mx.array, rounding: Rounding) -> mx.array:
    """A 3x3 convolution with a padding of 1 as Metal computes it, the factors of its 64 products rounded.

    Args:
        x: (1, H, W, C), fp32.
        weight: (O, 3, 3, C), fp32.
        rounding: of the products' factors.
    """
    _, height, width, channels = x.shape
    down, across = -(-height // _TILE), -(-width // _TILE)
    rows, columns = down * _TILE + 2, across * _TILE + 2
    padded = mx.contiguous(mx.pad(x[0], [(1, rows - height - 1), (1, columns - width - 1), (0, 0)]))
    row = columns * channels
    tiles = mx.as_strided(padded, (down, across, 8, 8, channels), (_TILE * row, _TILE * channels, row, channels, 1))
    moved = mx.einsum("ij,abjkc,lk->ilabc", _INPUT, tiles, _INPUT).reshape(64, -1, channels)
    kernels = mx.einsum("ij,ojkc,lk->ilco", _KERNEL, weight, _KERNEL).reshape(64, channels, -1)
    products = (rounding(moved) @ rounding(kernels)).reshape(8, 8, down, across, -1)
    back = mx.einsum("pi,ilabo,ql->apbqo", _OUTPUT, products, _OUTPUT)
    return back.reshape(1, rows - 2, columns - 2, -1)[:, :height, :width]


def metal(patch: pytest.MonkeyPatch, rounding: Rounding) -> list[tuple[int, ...]]:
    """Has the decoder compute as on Metal, its fp32 products' factors rounded; returns the convolutions it replaced.

    Metal takes Winograd for 3x3 kernels of 32 n channels, 256 and more together, and from 4096 pixels on, which every
    stage of a real image has: so here the size does not count.
    """
    convolve, add_product = mx.conv2d, mx.addmm
    replaced: list[tuple[int, ...]] = []

    def conv2d(x: mx.array, weight: mx.array, stride: object = 1, padding: object = 0, *more: object) -> mx.array:
        out, *kernel, channels = weight.shape
        fits = channels % 32 == out % 32 == 0 and channels + out >= 256 and kernel == [3, 3]
        if not fits or stride not in (1, (1, 1)):
            return convolve(x, weight, stride, padding, *more)
        replaced.append(weight.shape)
        rows, columns = padding if isinstance(padding, tuple) else (padding, padding)
        y = winograd(x, weight, rounding)  # pads by one; what is not wanted is cut off
        return y[:, 1 - rows : y.shape[1] - 1 + rows, 1 - columns : y.shape[2] - 1 + columns]

    def scaled_dot_product_attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: None = None
    ) -> mx.array:
        assert mask is None
        scores = mx.softmax(rounding(q * scale) @ rounding(k).swapaxes(-1, -2), axis=-1, precise=True)
        return rounding(scores) @ rounding(v)

    patch.setattr(mx, "conv2d", conv2d)
    patch.setattr(mx, "addmm", lambda c, a, b, *more: add_product(c, rounding(a), rounding(b), *more))
    if rounding is not exact:
        patch.setattr(mx.fast, "scaled_dot_product_attention", scaled_dot_product_attention)
    return replaced


def random_decoder() -> Decoder:
    """The decoder at its real width, with random weights that keep activations in range."""
    keys = iter(mx.random.split(mx.random.key(0), 1000))

    def value(path: str, array: mx.array) -> mx.array:
        if path.endswith("weight"):
            return mx.random.normal(array.shape, key=next(keys)) * (1.6 / math.sqrt(math.prod(array.shape[1:])))
        if path.endswith("gamma"):
            return mx.random.uniform(0.6, 1.4, array.shape, key=next(keys))
        return mx.random.normal(array.shape, key=next(keys)) * 0.05

    decoder = Decoder(VAEConfig())
    decoder.update(tree_map_with_path(value, decoder.parameters()))
    last = decoder.decoder.conv_out
    last.weight, last.bias = _CONTRAST * last.weight, _CONTRAST * last.bias
    mx.eval(decoder.parameters())
    return decoder


def test_the_emulated_convolution_is_a_convolution():
    x = mx.random.normal((1, 13, 20, 64), key=mx.random.key(1))
    weight = mx.random.normal((32, 3, 3, 64), key=mx.random.key(2)) / 24
    expected = np.array(mx.conv2d(x, weight, padding=1))
    assert np.abs(np.array(winograd(x, weight, exact)) - expected).max() < 1e-4
    assert 1e-4 < np.abs(np.array(winograd(x, weight, tf32)) - expected).max() < 0.1
    assert tf32(mx.array([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-10])).tolist() == [1, 1 + 2**-9, -1 - 2**-10]


@pytest.mark.reference
@pytest.mark.nightly
def test_what_tf32_does_to_a_image(monkeypatch):
    """Modelled: on M1 to M4, Winograd in fp32, no value differs by more than one level; with TF32 inside many do."""
    decoder, size = random_decoder(), 32
    latents = mx.conv2d(mx.random.normal((16, size, size, 1), key=mx.random.key(3)), mx.full((1, 3, 3, 1), 1 / 9), 1, 1)
    latents = latents.transpose(3, 1, 2, 0)  # smooth, as those of images

    def image(rounding: Rounding | None) -> np.ndarray:
        with monkeypatch.context() as patch:
            replaced = None if rounding is None else metal(patch, rounding)
            pixels = decode(decoder, VAEConfig(), latents)
        assert replaced is None or len(replaced) > 20
        return np.rint(np.array(pixels) * 255)

    reference = image(None)
    assert 40 < reference.std() < 90, "an image, not a plane"
    assert np.mean((reference == 0) | (reference == 255)) < 0.15
    changed = {rounding: np.abs(image(rounding) - reference) for rounding in (exact, tf32)}
    assert changed[exact].max() <= 1
    assert 0 < np.mean(changed[exact] > 0) < 0.001  # measured here: 0.0002
    assert 0.1 < np.mean(changed[tf32] > 0) < 0.4  # 0.20
    assert 0.0003 < np.mean(changed[tf32] > 1) < 0.01  # 0.001
    assert changed[tf32].max() <= 6  # 3
