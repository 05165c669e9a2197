"""The surroundings of every core call: limits of memory, faults of the GPU, and whom to tell."""

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
    """Keeps to limits and tells a callback meanwhile; a fault of the GPU unloads everything: it may hold zeros."""
    try:
        with limits(), gpu_faults(), report.using(progress):
            yield
    except BaseException as error:
        with suppress(RuntimeError):
            mx.synchronize()  # what is still queued ends here, and its errors do not meet the next call
        if isinstance(error, GPUError):
            components.release_all()
        raise
