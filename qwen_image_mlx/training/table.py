"""The frozen modulation of a run: the rows of every noise level it draws, on disk, read a few at a time.

Its matrices, a third of the model, are read once at the start (`modulation_table`) and never stay in memory. The
rows of 1000 levels of the released models are 4.4 GB; a batch needs 4.4 MB of them for each sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..files import check_writable
from ..gpu import gpu_faults
from ..models.qwen_image.transformer import BlockRows, Modulation
from ..pipeline.qwen_image.table import modulation_table
from ..weights.changes import WeightChanges
from ..weights.loader import ComponentWeights
from ..weights.safetensors_files import read_header, save_tensors

_LEVELS_PER_FILE = 50
_KEY = "qwen_image_mlx.table"


class LevelTable:
    """Rows by the index of a noise level.

    Args:
        folder: of the rows; those of the same model and levels are kept from one run to the next.
        weights: the transformer's, with the part "modulation".
        sigmas: every noise level (N,).
        levels: the indices that are drawn.
        dtype: of the rows.
        zero_cond_t: references have the rows of timestep 0.
        adapters: LoRAs, merged on the way.
        fingerprint: identifies the weights' files, on which the rows depend.

    Raises:
        OutputError: the rows could not be written.
        CheckpointError: the weights could not be read.
    """

    def __init__(
        self,
        folder: Path,
        weights: ComponentWeights,
        sigmas: mx.array,
        levels: Sequence[int],
        dtype: mx.Dtype,
        zero_cond_t: bool,
        adapters: WeightChanges | None,
        fingerprint: str,
    ):
        drawn = sorted({*levels})
        chunks = [drawn[n : n + _LEVELS_PER_FILE] for n in range(0, len(drawn), _LEVELS_PER_FILE)]
        self._files = {level: _file(folder, n) for n, chunk in enumerate(chunks) for level in chunk}
        key = repr((fingerprint, [sigmas[level].item() for level in drawn], str(dtype), zero_cond_t))
        key = hashlib.sha256(key.encode()).hexdigest()
        if all(_is_of(_file(folder, n), key) for n in range(len(chunks))):
            return
        check_writable(_file(folder, 0), nbytes=len(drawn) * weights.config.modulation_size * dtype.size)
        timesteps = [sigmas[level].item() for level in drawn]
        table = dict(zip(drawn, modulation_table(weights, timesteps, dtype, zero_cond_t, adapters), strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        for n, chunk in enumerate(chunks):
            arrays = {}
            for level in chunk:
                rows = table[level]
                blocks = [[mx.stack(block.text), mx.stack(block.target)] for block in rows.blocks]
                arrays[f"{level}.blocks"] = mx.stack([mx.stack(streams) for streams in blocks])
                arrays[f"{level}.out"] = mx.stack(rows.out)
            if zero_cond_t:
                arrays["references"] = mx.stack([mx.stack(block.references) for block in table[chunk[0]].blocks])
            save_tensors(_file(folder, n), arrays, {_KEY: key})

    def __call__(self, levels: Sequence[int]) -> Modulation:
        """The rows of a batch's samples: (D,) if there is one sample, else (B, 1, D)."""
        found = []
        for level in levels:
            try:
                arrays = mx.load(str(self._files[level]))  # of many levels; one is read
                found.append(
                    {name: arrays[name] for name in (f"{level}.blocks", f"{level}.out", "references") if name in arrays}
                )
                with gpu_faults():
                    mx.eval(found[-1])
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{self._files[level]} is gone or damaged ({error}): resume the run") from error
        blocks = _of_samples([arrays[f"{level}.blocks"] for level, arrays in zip(levels, found, strict=True)])
        out = _of_samples([arrays[f"{level}.out"] for level, arrays in zip(levels, found, strict=True)])
        references = found[0].get("references")
        return Modulation(
            [
                BlockRows([*text], [*target], [*(target if references is None else references[n])])
                for n, (text, target) in enumerate(blocks)
            ],
            [*out],
        )


def _of_samples(arrays: Sequence[mx.array]) -> mx.array:
    """(…, D) of each sample as (…, B, 1, D); of a single one (…, D), the shape for which the kernels are fastest."""
    return arrays[0] if len(arrays) == 1 else mx.stack(arrays, axis=-2)[..., None, :]


def _file(folder: Path, number: int) -> Path:
    return folder / f"modulation-{number:02}.safetensors"


def _is_of(path: Path, key: str) -> bool:
    try:
        return path.is_file() and read_header(path)[1].get(_KEY) == key
    except CheckpointError:
        return False
