"""Measures how fast weights are read: writes a file, drops it from the system's cache, and reads it with `mx.load`."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import OutputError
from ..gpu import finish
from ..weights.mapping import expected_tensors
from ..weights.synthetic import FULL, ROWS
from .measure import on_gpu, on_metal
from .outcome import Outcome
from .values import uniform

_CHUNK = 16 << 20  # bytes written at once
_SIZE, _CPU_SIZE = 1 << 30, 64 << 20
_SPARE = 2 << 30  # bytes of the disk that stay free
_SLOW = 1.0  # GB/s, below which streamed layers take longer to read than to run
_NOCACHE = "F_NOCACHE"  # macOS: pages of this file are not kept


def run(options: Mapping[str, Any]) -> Outcome:
    """Writes and reads a file, in a folder that the parent process removes in any case."""
    outcome, size = Outcome(), _SIZE if on_gpu() else _CPU_SIZE
    path = Path(options["folder"]) / "weights.safetensors"
    if shutil.disk_usage(path.parent).free < size + _SPARE:
        outcome.find("odd", "the disk that models are kept on is full; nothing was measured")
        return outcome
    try:
        start = time.perf_counter()
        write(path, size)
        written = time.perf_counter() - start
    except OSError as error:
        raise OutputError(f"the disk that models are kept on cannot be written to: {error.strerror}") from error
    try:
        start = time.perf_counter()
        (values,) = mx.load(str(path)).values()
        finish(values)
        seconds = time.perf_counter() - start
        if not mx.array_equal(values[-1], mx.array(_chunk())).item():
            outcome.find("wrong", "what was read is not what was written; check the disk")
    finally:
        path.unlink()
    rate, streamed = size / seconds / 1e9, streamed_bytes()
    outcome.figures = {
        "size_bytes": size, "write_gbs": size / written / 1e9, "read_gbs": rate, "streamed_bytes": streamed,
        "streamed_pass_s": streamed / rate / 1e9,
    }  # fmt: skip
    took = f"{streamed / rate / 1e9:.0f} s of a pass"
    outcome.summary = f"weights are read at {rate:.2f} GB/s; where layers are streamed in bf16, {took}"
    if rate < _SLOW and on_metal():
        cure = "keep models on the internal disk, or quantize them so that they stay in memory"
        outcome.find("slow", f"{outcome.summary}; {cure}")
    return outcome


def write(path: Path, size: int) -> None:
    """A safetensors file of `size` bytes, of hashed fp32 values, that the system does not keep in its cache."""
    chunk, count = _chunk(), size // _CHUNK
    index = {"values": {"dtype": "F32", "shape": [count, chunk.size], "data_offsets": [0, count * chunk.nbytes]}}
    header = json.dumps(index).encode()
    with path.open("wb") as file:
        _forget(file.fileno())
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(count):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        _forget(file.fileno())


def _forget(descriptor: int) -> None:
    """Keeps a file's pages out of the cache, as far as the system allows."""
    import fcntl

    if hasattr(fcntl, _NOCACHE):
        fcntl.fcntl(descriptor, getattr(fcntl, _NOCACHE), 1)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _chunk() -> np.ndarray:
    return uniform("disk", (_CHUNK // 4,))


def streamed_bytes() -> int:
    """Bytes of the released transformer that are read at each pass when its layers are streamed, in bf16."""
    specs = expected_tensors(ROWS["transformer"], FULL["transformer"]).values()
    return 2 * sum(int(np.prod(spec.shape)) for spec in specs if spec.part == "main")
