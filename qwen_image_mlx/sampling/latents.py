"""The latent space of a model: its dimensions, and packing of frames into a sequence of tokens and back.

A token is a patch of `patch` x `patch` latents. Tokens run in raster order, frame after frame; a token's channels are
ordered (channel, row, column). Source: the pipelines' _pack_latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class LatentSpace:
    """The latent space that the configs of an autoencoder and a transformer define.

    Attributes:
        channels: of a latent.
        factor: pixels along the side of a latent.
        patch: latents along the side of a token.
        size_multiple: both sides of an image must be multiples of this many pixels.
        pixel_channels: of an image as the autoencoder has it: 3, or 4 with alpha.
    """

    channels: int
    factor: int
    patch: int
    size_multiple: int
    pixel_channels: int

    @property
    def token_side(self) -> int:
        """Pixels along the side of a token."""
        return self.factor * self.patch

    @property
    def token_channels(self) -> int:
        """Channels of a token."""
        return self.channels * self.patch**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of width x height pixels."""
        return height // self.token_side, width // self.token_side

    def tokens(self, width: int, height: int) -> int:
        """Number of tokens of an image of width x height pixels."""
        return width * height // self.token_side**2

    def shape(self, frames: int, width: int, height: int) -> tuple[int, int, int]:
        """Shape (1, N, C) of the packed latents of `frames` frames of width x height pixels."""
        rows, columns = self.grid(width, height)
        return 1, frames * rows * columns, self.token_channels

    def pack(self, latents: mx.array) -> mx.array:
        """(B, h, w, channels) to tokens (B, N, C)."""
        return pack_latents(latents, self.patch)

    def pack_frames(self, latents: mx.array) -> mx.array:
        """(B, F, h, w, channels) to one sequence of tokens (B, N, C)."""
        return pack_multi_layer_latents(latents, self.patch)

    def unpack_frames(self, tokens: mx.array, frames: int, width: int, height: int) -> mx.array:
        """Tokens (B, N, C) to (B, F, h, w, channels); width and height are in pixels."""
        return unpack_multi_layer_latents(tokens, frames, height // self.factor, width // self.factor, self.patch)


def pack_latents(latents: mx.array, patch: int = 2) -> mx.array:
    """(B, h, w, C), h and w multiples of the patch p, to (B, h/p * w/p, p * p * C)."""
    b, h, w, c = latents.shape
    patches = latents.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, (h // patch) * (w // patch), patch**2 * c)


def unpack_latents(tokens: mx.array, height: int, width: int, patch: int = 2) -> mx.array:
    """(B, height/p * width/p, p * p * C) to (B, height, width, C); height and width are those of the latents."""
    b, _, channels = tokens.shape
    c = channels // patch**2
    patches = tokens.reshape(b, height // patch, width // patch, c, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return patches.reshape(b, height, width, c)


def pack_multi_layer_latents(latents: mx.array, patch: int = 2) -> mx.array:
    """Frames (B, F, h, w, C) to one sequence (B, F * h/p * w/p, p * p * C)."""
    tokens = pack_latents(latents.flatten(0, 1), patch)
    return tokens.reshape(latents.shape[0], -1, tokens.shape[-1])


def unpack_multi_layer_latents(tokens: mx.array, frames: int, height: int, width: int, patch: int = 2) -> mx.array:
    """(B, F * height/p * width/p, p * p * C) to (B, F, height, width, C); height and width are those of the latents."""
    b, _, channels = tokens.shape
    return unpack_latents(tokens.reshape(b * frames, -1, channels), height, width, patch).reshape(
        b, frames, height, width, channels // patch**2
    )
