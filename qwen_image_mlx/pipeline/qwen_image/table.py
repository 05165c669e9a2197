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
    specs = {spec.name: spec for spec in weights.specs("modulation")}
    reader = Reader(weights.component.role)

    def array(name: str) -> mx.array:
        value = weights.open(specs[name], reader)
        value = value.dequantize() if isinstance(value, Packed) else value
        if adapters and adapters.changes(name):
            return adapters.apply(name, value)  # in fp32, so that nothing is lost
        return value.astype(dtype)

    def linear(name: str, x: mx.array) -> mx.array:
        w, b = array(f"{name}.weight"), array(f"{name}.bias")
        return mx.addmm(b, x.astype(w.dtype), w.T).astype(dtype)

    steps, addition = len(timesteps), f"{_TIME}.addition_t_embedding.weight"
    embedding = time_embedding(
        mx.array([*map(float, timesteps), 0.0], dtype=mx.float32),
        dtype,
        lambda name, x: linear(f"{_TIME}.{name}", x),
        array(addition) if addition in specs else None,
    )

    def rows(name: str, scales: tuple[int, ...]) -> list[Rows]:
        """The rows (D,) of each step, with 1 added to scales; the last ones are for timestep 0."""
        out = split_rows(linear(name, embedding), embedding.shape[-1], scales)
        mx.eval(out)
        views: list[Rows] = [[step[row] for row in range(out.shape[1])] for step in (out[n] for n in range(steps + 1))]
        mx.eval(views)
        return views

    held = [name.removesuffix("img_mod.1.weight") for name in specs if name.endswith(".img_mod.1.weight")]
    blocks = [tuple(rows(f"{block}{stream}_mod.1", BLOCK_SCALES) for stream in ("txt", "img")) for block in held]
    out = rows("norm_out.linear", OUT_SCALES)
    return [
        Modulation([BlockRows(txt[i], img[i], img[-1 if zero_cond_t else i]) for txt, img in blocks], out[i])
        for i in range(steps)
    ]
