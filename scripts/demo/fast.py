"""The autoencoder's networks as they train fastest on a CPU: the same numbers as `qwen_image/vae.py` to rounding.

MLX's CPU backend takes ten nanoseconds for one exponential and twenty times as long for the gradient of a strided
convolution as for a plain one. So the sigmoid is a quotient of polynomials, a strided convolution is a plain one over
2x2 blocks moved to the channels, and nothing is computed in bands.
"""

from __future__ import annotations

import mlx.core as mx

from qwen_image_mlx.models.qwen_image import vae

# tanh(x) = x p(x^2) / q(x^2) to 2e-7 for |x| < 7.9, where it is 1 in fp32; coefficients: Eigen, ptanh_float.
_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
      1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
# Which row of x a tap of the convolution meets: [upper or lower row of a doubled one, tap, row above, here or below].
_TAPS = mx.array([[[1, 0, 0], [0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 1, 0], [0, 0, 1]]], mx.float32)


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """x sigmoid(x), any shape."""
    return x * sigmoid(x)


@silu.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    s = sigmoid(x)
    return cotangent * s * (1 + x * (1 - s))


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), any shape."""
    x = mx.clip(0.5 * x, -7.905, 7.905)
    square = x * x
    return 0.5 + 0.5 * x * _polynomial(_P, square) / _polynomial(_Q, square)


def encode(encoder: vae.Encoder, pixels: mx.array) -> tuple[mx.array, mx.array]:
    """Latent mean and log-variance, each (B, H/8, W/8, z), of pixels (B, H, W, C) in [-1, 1]."""
    body = encoder.encoder
    x = body.conv_in(pixels)
    for block in body.down_blocks:
        x = _halve(block, x) if isinstance(block, vae.Downsample) else _residual(block, x)
    moments = encoder.quant_conv(_head(body, _middle(body.mid_block, x)))
    mean, log_variance = mx.split(moments, 2, axis=-1)
    return mean, log_variance


def decode(decoder: vae.Decoder, latents: mx.array) -> mx.array:
    """Pixels (B, 8h, 8w, C), not clamped, of unnormalised latents (B, h, w, z)."""
    body = decoder.decoder
    x = _middle(body.mid_block, body.conv_in(decoder.post_quant_conv(latents)))
    for block in body.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x)
        if "upsamplers" in block:
            x = _double(block.upsamplers[0], x)
    return _head(body, x)


def _residual(block: vae.ResidualBlock, x: mx.array) -> mx.array:
    shortcut = block.conv_shortcut(x) if "conv_shortcut" in block else x
    x = _convolve(block.conv1, silu(block.norm1(x)))
    return shortcut + _convolve(block.conv2, silu(block.norm2(x)))


def _middle(block: vae.MidBlock, x: mx.array) -> mx.array:
    x = _residual(block.resnets[0], x)
    x = mx.concatenate(list(block.attentions[0](x)), axis=1)
    return _residual(block.resnets[1], x)


def _head(body, x: mx.array) -> mx.array:
    return _convolve(body.conv_out, silu(body.norm_out(x)))


def _convolve(conv: vae.Conv2d, x: mx.array) -> mx.array:
    return mx.conv2d(x, conv.weight, padding=1) + conv.bias


def _double(block: vae.Upsample, x: mx.array) -> mx.array:
    """Doubling by repetition, then a 3x3 convolution, as one of x that makes all four pixels of a 2x2 block."""
    conv = block.resample[1]
    b, h, w, _ = x.shape
    cout, *_, cin = conv.weight.shape
    weight = mx.einsum("pai,qbj,oabc->pqoijc", _TAPS, _TAPS, conv.weight).reshape(4 * cout, 3, 3, cin)
    x = mx.conv2d(x, weight, padding=1).reshape(b, h, w, 2, 2, cout)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, cout) + conv.bias


def _halve(block: vae.Downsample, x: mx.array) -> mx.array:
    """Its 3x3 convolution of stride 2 as one of 2x2 over blocks of 2x2 pixels; the fourth row and column weigh 0."""
    conv = block.resample[1]
    b, h, w, c = x.shape
    x = mx.pad(x, [(0, 0), (0, 2), (0, 2), (0, 0)]).reshape(b, h // 2 + 1, 2, w // 2 + 1, 2, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2 + 1, w // 2 + 1, 4 * c)
    weight = mx.pad(conv.weight, [(0, 0), (0, 1), (0, 1), (0, 0)]).reshape(-1, 2, 2, 2, 2, c)
    weight = weight.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2, 2, 4 * c)
    return mx.conv2d(x, weight) + conv.bias


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    total = mx.array(coefficients[0], x.dtype)
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total
