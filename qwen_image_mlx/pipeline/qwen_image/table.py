"""The modulation table: everything the timesteps contribute to the transformer, computed before the first step.

One third of the transformer's weights turn the timestep into shifts, scales and gates and depend on nothing else. Here
each of them is read from its file, used for all timesteps at once, and dropped, so that they never stay resident: the
peak is the table plus one weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...models.qwen_image.modulation import BLOCK_SCALES, OUT_SCALES, split_rows, time_embedding
from ...models.qwen_image.transformer import BlockRows, Modulation, Rows
from ...weights.changes import WeightChanges
from ...weights.loader import ComponentWeights
from ...weights.packed import Packed
from ...weights.tensor_formats import Reader

_TIME = "time_text_embed"
_BLOCKS = "transformer_blocks"


class Folding:
    """Applies single weights of a component to all timesteps: each is read when it is used, and dropped.

    Args:
        weights: with the part "modulation".
        dtype: dtype of the results.
        adapters: LoRAs, merged on the way.
    """

    def __init__(self, weights: ComponentWeights, dtype: mx.Dtype, adapters: WeightChanges | None = None):
        self._weights, self._dtype, self._adapters = weights, dtype, adapters
        self._specs = {spec.name: spec for spec in weights.specs("modulation")}
        self._reader = Reader(weights.component.role)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._specs

    def array(self, name: str) -> mx.array:
        """A tensor, dense; with a LoRA in fp32, so that nothing is lost, else in the dtype."""
        value = self._weights.open(self._specs[name], self._reader)
        value = value.dequantize() if isinstance(value, Packed) else value
        if self._adapters and self._adapters.changes(name):
            return self._adapters.apply(name, value)
        return value.astype(self._dtype)

    def linear(self, name: str, x: mx.array) -> mx.array:
        """A linear layer's result (S, R) of x (S, D)."""
        w, b = self.array(f"{name}.weight"), self.array(f"{name}.bias")
        return mx.addmm(b, x.astype(w.dtype), w.T).astype(self._dtype)

    def embedding(self, timesteps: Sequence[float] | np.ndarray) -> mx.array:
        """The time embedding (S + 1, D) of timesteps in [0, 1]; its last row is that of timestep 0."""
        addition = f"{_TIME}.addition_t_embedding.weight"
        return time_embedding(
            mx.array([*map(float, timesteps), 0.0], dtype=mx.float32),
            self._dtype,
            lambda name, x: self.linear(f"{_TIME}.{name}", x),
            self.array(addition) if self.has(addition) else None,
        )

    def rows(self, name: str, embedding: mx.array, scales: tuple[int, ...]) -> list[Rows]:
        """The rows (D,) of each row of an embedding (S, D), evaluated, with 1 added to those that scale."""
        out = split_rows(self.linear(name, embedding), embedding.shape[-1], scales)
        mx.eval(out)
        views: list[Rows] = [[step[row] for row in range(out.shape[1])] for step in (out[n] for n in range(len(out)))]
        mx.eval(views)
        return views

    def blocks(self, embedding: mx.array, layers: str = _BLOCKS) -> list[tuple[list[Rows], list[Rows]]]:
        """The rows of the text and of the image of each block in the list `layers`."""
        numbers = [
            name.removeprefix(f"{layers}.").removesuffix(".img_mod.1.weight")
            for name in self._specs
            if name.startswith(f"{layers}.") and name.endswith(".img_mod.1.weight")
        ]
        return [
            (
                self.rows(f"{layers}.{n}.txt_mod.1", embedding, BLOCK_SCALES),
                self.rows(f"{layers}.{n}.img_mod.1", embedding, BLOCK_SCALES),
            )
            for n in numbers
        ]


def modulation_table(
    weights: ComponentWeights,
    timesteps: Sequence[float] | np.ndarray,
    dtype: mx.Dtype,
    zero_cond_t: bool = False,
    adapters: WeightChanges | None = None,
) -> list[Modulation]:
    """The modulation of every step of a schedule.

    Args:
        weights: the transformer's weights, with the part "modulation".
        timesteps: sigma as the model is given it, in [0, 1]; rounded to `dtype` here, as the reference does.
        dtype: dtype of the rows.
        zero_cond_t: reference tokens are modulated as at timestep 0, whatever the step.
        adapters: LoRAs, merged on the way.

    Returns:
        One `Modulation` per timestep, of the weights' blocks, evaluated: it belongs to no thread. Its rows are views
        into one array per block and stream.
    """
    folding, steps = Folding(weights, dtype, adapters), len(timesteps)
    embedding = folding.embedding(timesteps)
    blocks, out = folding.blocks(embedding), folding.rows("norm_out.linear", embedding, OUT_SCALES)
    return [
        Modulation([BlockRows(txt[i], img[i], img[-1 if zero_cond_t else i]) for txt, img in blocks], out[i])
        for i in range(steps)
    ]
