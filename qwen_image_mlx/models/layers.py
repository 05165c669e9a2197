"""MLX's own layers, born with zeros: a checkpoint fills them, so building a model draws nothing from the application's
global random state, which MLX's initialisers would advance.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Linear(nn.Linear):
    """`nn.Linear` without random initialisation."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        nn.Module.__init__(self)
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))


class Embedding(nn.Embedding):
    """`nn.Embedding` without random initialisation."""

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a 3x3 kernel and a bias, without random initialisation; weight (out, 3, 3, in)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_channels, 3, 3, in_channels))
        self.bias = mx.zeros((out_channels,))
        self.stride, self.padding, self.dilation, self.groups = stride, padding, 1, 1
