"""The parts of mlx.nn that this package uses, imported from where they are defined.

`mlx.nn` hands its names on by `import *`, and a type checker does not count those as a typed package's own.
"""

from mlx.nn.layers.activations import GELU as GELU
from mlx.nn.layers.activations import gelu as gelu
from mlx.nn.layers.activations import silu as silu
from mlx.nn.layers.base import Module as Module
from mlx.nn.layers.convolution import Conv2d as Conv2d
from mlx.nn.layers.embedding import Embedding as Embedding
from mlx.nn.layers.linear import Identity as Identity
from mlx.nn.layers.linear import Linear as Linear
from mlx.nn.layers.normalization import RMSNorm as RMSNorm
from mlx.nn.layers.quantized import QuantizedEmbedding as QuantizedEmbedding
from mlx.nn.layers.quantized import QuantizedLinear as QuantizedLinear
