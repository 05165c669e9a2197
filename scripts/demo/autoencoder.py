"""Trains the demo's autoencoders on scenes and writes them in the released layout.

The images of a step follow from its number, so a run that is taken up again sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.models.qwen_image.vae import Decoder, Encoder
from qwen_image_mlx.training.loss import key_of
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.weights.safetensors_files import save_tensors

from . import fast
from .scenes import SHAPES, SIDE, Thing, analyse, coverage, draw_scene

KL_WEIGHT = 1e-4
EDGE_WEIGHT = 3.0  # how much more a pixel counts where the image changes
HELD_OUT_SEED = 7
WARM_UP = 100  # steps
EMA = 0.999


class Autoencoder(nn.Module):
    """Encoder and decoder of one config, born with random weights.

    Args:
        config: of the VAE.
        seed: of the weights.
    """

    def __init__(self, config: VAEConfig, seed: int = 0):
        super().__init__()
        self.encode_side, self.decode_side = Encoder(config), Decoder(config)
        self.apply_to_modules(_Init(seed))

    def __call__(self, pixels: mx.array, noise: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Reconstruction of pixels (B, H, W, C) in [-1, 1] from drawn latents, and the latents' two moments."""
        mean, log_variance = fast.encode(self.encode_side, pixels)
        log_variance = mx.clip(log_variance, -30, 20)
        return fast.decode(self.decode_side, mean + mx.exp(0.5 * log_variance) * noise), mean, log_variance


class _Init:
    """Uniform weights whose outputs are about a third of their inputs' size, as torch's layers are born."""

    def __init__(self, seed: int):
        self.key = mx.random.key(seed)

    def __call__(self, path: str, module: nn.Module) -> None:
        if "weight" in module:
            self.key, key = mx.random.split(self.key)
            limit = module.weight[0].size ** -0.5
            module.weight = mx.random.uniform(-limit, limit, module.weight.shape, key=key)


def reconstruction_loss(model: Autoencoder, pixels: mx.array, noise: mx.array) -> mx.array:
    """L1 + MSE / 2, edges counting more, + a little KL, each averaged over its elements."""
    out, mean, log_variance = model(pixels, noise)
    error = out - pixels
    distance = mx.abs(error) + 0.5 * error * error
    kl = 0.5 * (mean * mean + mx.exp(log_variance) - 1 - log_variance)
    return (distance * _edge_weights(pixels)).mean() + KL_WEIGHT * kl.mean()


def _edge_weights(pixels: mx.array) -> mx.array:
    """1 where the image is flat, up to 1 + `EDGE_WEIGHT` where it is not; (B, H, W, 1)."""
    rows = mx.abs(pixels[:, 1:] - pixels[:, :-1]).max(axis=-1, keepdims=True)
    cols = mx.abs(pixels[:, :, 1:] - pixels[:, :, :-1]).max(axis=-1, keepdims=True)
    change = (
        mx.pad(rows, [(0, 0), (0, 1), (0, 0), (0, 0)]) + mx.pad(rows, [(0, 0), (1, 0), (0, 0), (0, 0)])
        + mx.pad(cols, [(0, 0), (0, 0), (0, 1), (0, 0)]) + mx.pad(cols, [(0, 0), (0, 0), (1, 0), (0, 0)])
    )  # fmt: skip
    return 1 + EDGE_WEIGHT * mx.clip(2 * change, 0, 1)


# Images -------------------------------------------------------------------------------------------------------------


def training_images(seed: int, step: int, count: int, channels: int) -> np.ndarray:
    """(count, side, side, channels), uint8: half of them scenes, half shapes of any colour, size and place."""
    rng = np.random.default_rng([seed, step])
    draw = {3: _opaque, 4: _layered}[channels]
    return np.stack([draw(rng, free=n % 2 == 1) for n in range(count)])


def held_out_images(count: int, channels: int, things: int = 1) -> np.ndarray:
    """(count, side, side, channels), uint8: scenes never trained on; with four channels, also their layers."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    scenes = [draw_scene(rng, things=things, held_out=True) for _ in range(count)]
    if channels == 3:
        return np.stack([scene.render() for scene in scenes])
    return np.stack([_with_alpha(scene.render()) if n % 2 else scene.layers()[-1] for n, scene in enumerate(scenes)])


def to_signed(images: np.ndarray) -> mx.array:
    """uint8 to fp32 in [-1, 1]."""
    return mx.array(images.astype(np.float32) / 127.5 - 1)


def _opaque(rng: np.random.Generator, free: bool) -> np.ndarray:
    if not free:
        return draw_scene(rng, things=int(rng.integers(1, 3))).render()
    image = np.broadcast_to(rng.integers(0, 256, 3), (SIDE, SIDE, 3)).astype(np.float64)
    for _ in range(rng.integers(1, 4)):
        alpha = coverage(_any_thing(rng))[..., None]
        image = rng.integers(0, 256, 3) * alpha + image * (1 - alpha)
    return np.rint(image).astype(np.uint8)


def _layered(rng: np.random.Generator, free: bool) -> np.ndarray:
    """An opaque image as often as one layer of it."""
    if rng.random() < 0.5:
        return _with_alpha(_opaque(rng, free))
    if not free:
        layers = draw_scene(rng, things=int(rng.integers(1, 3))).layers()
        return layers[rng.integers(1, len(layers))]
    alpha = np.rint(255 * coverage(_any_thing(rng)))[..., None]
    return np.concatenate([np.broadcast_to(rng.integers(0, 256, 3), (SIDE, SIDE, 3)), alpha], axis=-1).astype(np.uint8)


def _any_thing(rng: np.random.Generator) -> Thing:
    return Thing(str(rng.choice(SHAPES)), "", *rng.uniform(0, 1, 2), radius=rng.uniform(0.1, 0.4))


def _with_alpha(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


# Training -------------------------------------------------------------------------------------------------------------


class Trainer:
    """A run: weights, their moving average, the optimizer's state and the number of steps done.

    Args:
        config: of the VAE.
        steps: in which the learning rate falls to nothing along a cosine.
        rate: the learning rate of matrices and convolutions, by Muon; everything else has a third of it, by AdamW.
        seed: of weights, images and noise.
        weights: of another run's model, to begin with; channels that they lack begin at zero.
    """

    def __init__(
        self,
        config: VAEConfig,
        steps: int,
        *,
        rate: float = 3e-3,
        seed: int = 0,
        weights: Mapping[str, mx.array] | None = None,
    ):
        self.config, self.seed, self.step = config, seed, 0
        self.model = Autoencoder(config, seed)
        self.parameters = dict(tree_flatten(self.model.parameters()))
        if weights is not None:
            self.parameters = {name: _widened(weights[name], new.shape) for name, new in self.parameters.items()}
        self.average = dict(self.parameters)
        self._optimizer = Optimizer(
            Rate(rate / 3, WARM_UP, "cosine", steps), weight_decay=0.0, betas=(0.9, 0.99),
            muon=lambda name, array: array.ndim > 1, muon_rate=Rate(rate, WARM_UP, "cosine", steps),
        )  # fmt: skip
        self._optimizer.init(self.parameters)
        self._gradients = mx.value_and_grad(self._loss)

    def run(self, until: int, batch: int = 16) -> float:
        """Steps up to a number of them; returns their mean loss."""
        losses = []
        while self.step < until:
            pixels = to_signed(training_images(self.seed, self.step, batch, self.config.input_channels))
            side = SIDE // self.config.spatial_factor
            shape = (batch, side, side, self.config.z_dim)
            noise = mx.random.normal(shape, key=key_of(self.seed, "latents", self.step))
            loss, gradients = self._gradients(self.parameters, pixels, noise)
            gradients, _ = self._optimizer.clip(gradients)
            self.parameters = self._optimizer.update(self.step, self.parameters, gradients)
            keep = min(EMA, (1 + self.step) / (10 + self.step))
            self.average = {name: keep * self.average[name] + (1 - keep) * w for name, w in self.parameters.items()}
            mx.eval(self.parameters, self.average, self._optimizer.state)
            self.step += 1
            losses.append(loss.item())
        return float(np.mean(losses))

    def averaged(self) -> Autoencoder:
        """The model with the averaged weights."""
        return _put(self.model, self.average)

    def save(self, path: Path) -> None:
        """Writes everything a resumed run needs, whole or not at all."""
        parts = {"parameters": self.parameters, "average": self.average, "optimizer": self._optimizer.state}
        tensors = {f"{part} {name}": value for part, arrays in parts.items() for name, value in arrays.items()}
        save_tensors(path, tensors, {"step": str(self.step)})

    def restore(self, path: Path) -> None:
        """Takes a run up where `save` left it."""
        tensors, metadata = mx.load(str(path), return_metadata=True)
        parts: dict[str, dict[str, mx.array]] = {"parameters": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, name = name.partition(" ")
            parts[part][name] = value
        # In their order, which is that of the sum in the gradients' norm.
        self.parameters, self.average = ({n: parts[p][n] for n in self.parameters} for p in ("parameters", "average"))
        self._optimizer.restore(self.parameters, parts["optimizer"])
        self.step = int(metadata["step"])

    def _loss(self, parameters: Mapping[str, mx.array], pixels: mx.array, noise: mx.array) -> mx.array:
        return reconstruction_loss(_put(self.model, parameters), pixels, noise)


def _put(model: Autoencoder, weights: Mapping[str, mx.array]) -> Autoencoder:
    model.update(tree_unflatten([*weights.items()]))
    return model


def _widened(value: mx.array, shape: tuple[int, ...]) -> mx.array:
    return mx.pad(value, [(0, new - old) for old, new in zip(value.shape, shape, strict=True)])


def load_averaged(config: VAEConfig, path: Path) -> Autoencoder:
    """The model of a state that `Trainer.save` wrote, with the averaged weights."""
    return _put(Autoencoder(config), averaged_weights(path))


def averaged_weights(path: Path) -> dict[str, mx.array]:
    """The averaged weights of such a state, by name."""
    found = mx.load(str(path))
    return {name.removeprefix("average "): value for name, value in found.items() if name.startswith("average ")}


# Judging --------------------------------------------------------------------------------------------------------------


def reconstruct(model: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C), uint8, through the autoencoder, by the most likely latents."""
    mean, _ = fast.encode(model.encode_side, to_signed(images))
    out = np.array(fast.decode(model.decode_side, mean))
    return np.rint(np.clip(out * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


def judge(model: Autoencoder, channels: int, count: int = 200) -> dict[str, float]:
    """How well held-out images survive: PSNR in dB, of one and two things, and the part judged as the originals."""
    one, two = (held_out_images(count, channels, things) for things in (1, 2))
    back = reconstruct(model, one)
    alike = [_judged(a) == _judged(b) for a, b in zip(one, back, strict=True)]
    return {"psnr": psnr(one, back), "psnr_two": psnr(two, reconstruct(model, two)), "alike": float(np.mean(alike))}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over images (N, …), uint8, of the peak signal to noise ratio in dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2, axis=tuple(range(1, a.ndim)))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def _judged(image: np.ndarray) -> tuple:
    """What the analyser sees; what is transparent is seen on grey."""
    if image.shape[-1] == 4:
        alpha = image[..., 3:] / 255
        image = np.rint(image[..., :3] * alpha + 128 * (1 - alpha)).astype(np.uint8)
    found = analyse(image)
    return found.background, found.colour, found.shape


# Writing --------------------------------------------------------------------------------------------------------------


def with_statistics(model: Autoencoder, config: VAEConfig, count: int = 1000) -> VAEConfig:
    """The config with mean and deviation of every latent channel over scenes."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    draw = {3: _opaque, 4: _layered}[config.input_channels]
    images = np.stack([draw(rng, free=False) for _ in range(count)])
    means = [fast.encode(model.encode_side, to_signed(part))[0] for part in np.split(images, count // 50)]
    latents = np.array(mx.concatenate(means), np.float64)
    mean, std = (getattr(latents, name)(axis=(0, 1, 2)).round(5).tolist() for name in ("mean", "std"))
    return replace(config, latents_mean=tuple(mean), latents_std=tuple(std))


def module_weights(model: Autoencoder) -> dict[str, mx.array]:
    """Every weight by its name in a checkpoint."""
    return dict(tree_flatten(model.encode_side.parameters())) | dict(tree_flatten(model.decode_side.parameters()))
