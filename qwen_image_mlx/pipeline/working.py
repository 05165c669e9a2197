"""The context of every core call: memory limits, GPU faults, and the progress callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from ..errors import GPUError
from ..gpu import gpu_faults
from .components import Components
from .limits import limits
from .progress import ProgressCallback
from .reporter import Reporter


@contextmanager
def working(components: Components, report: Reporter, progress: ProgressCallback | None) -> Iterator[None]:
    """Sets limits and a callback inside the block; after a GPU fault all weights are released, as they may be zeros."""
    try:
        with limits(), gpu_faults(), report.using(progress):
            yield
    except BaseException as error:
        with suppress(RuntimeError):
            mx.synchronize()  # waits for queued work, so that its errors do not reach the next call
        if isinstance(error, GPUError):
            components.release_all()
        raise
