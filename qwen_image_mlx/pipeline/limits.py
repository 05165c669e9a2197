"""The memory that may be used on this machine, and MLX's own limits during work."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

_SHARE = 0.9  # of what Metal recommends, or Linux has available
_KEPT_FOR_MACOS = 4 * 10**9  # bytes, on Macs of up to 24 GB
_SMALL = 25 << 30  # bytes of a Mac that counts as one of these
# Bytes that MLX may keep for reuse at least, on machines from 16 GB: with less it would free memory and
# allocate it again in every block of a step.
_LEAST_CACHE = 3 << 29
_SMALLEST_CACHE = 1 << 29  # on smaller ones
_CPU_CACHE = 32 << 20  # MLX's default cache limit on a CPU, which no user has set
_lock, _entered = threading.Lock(), 0  # how many calls are inside `limits`, in all threads
_outside = (0, 0)  # the cache and memory limits before the first of them


def memory_size() -> int:
    """Bytes of this machine's memory."""
    if mx.metal.is_available():
        return _of_gpu("memory_size")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory() -> int:
    """Bytes that a plan may use on this machine.

    On a Mac nine tenths of what Metal recommends as a working set, and on those of up to 24 GB at least 4 GB are left
    to macOS and other programs; on Linux nine tenths of what is available.
    """
    if mx.metal.is_available():
        budget = int(_SHARE * _of_gpu("max_recommended_working_set_size"))
        return min(budget, memory_size() - _KEPT_FOR_MACOS) if memory_size() < _SMALL else budget
    return int(_SHARE * free_memory())


def _of_gpu(fact: str) -> int:
    """A fact that MLX states about the GPU, whatever an app's default device is."""
    return int(mx.device_info(mx.gpu)[fact])


def free_memory() -> int:
    """Bytes that are free now or can be freed at once; the whole memory if the system does not tell."""
    if mx.metal.is_available():
        try:
            level = subprocess.run(
                ["/usr/sbin/sysctl", "-n", "kern.memorystatus_level"], capture_output=True, text=True, timeout=5
            )
            return memory_size() * int(level.stdout) // 100
        except (OSError, ValueError, subprocess.SubprocessError):
            return memory_size()
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return memory_size()


@contextmanager
def limits(budget: int | None = None, working: int = 0, *, wire: bool = False) -> Iterator[None]:
    """Sets MLX's memory and cache limits inside the block, and restores them afterwards.

    Above the memory limit MLX waits for running work before it allocates more. Limits that are tighter already,
    an app's or those of a call around this one, stay.

    Args:
        budget: bytes that may be used; None is `usable_memory()`, unless a call around this one has set limits.
        working: bytes that work takes in addition to weights. 1.5 times that is kept for reuse, so that no block of a
            step allocates again (modelled).
        wire: also keep memory in use from being paged out (macOS 15 and newer). Off, because macOS panics on some
            machines while wired memory comes and goes: https://github.com/ml-explore/mlx/issues/3186
    """
    global _entered, _outside
    with _lock:
        if not _entered:
            _outside = _limits_now()
        has_wishes = budget is not None or not _entered
        _entered += 1
    try:
        if has_wishes:
            with _set(usable_memory() if budget is None else budget, working, wire):
                yield
        else:
            yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:  # whatever order calls in several threads ended in
                mx.set_cache_limit(_outside[0])
                mx.set_memory_limit(_outside[1])


def _limits_now() -> tuple[int, int]:
    """MLX's cache and memory limits; MLX returns them only when they are set."""
    cached, memory = mx.set_cache_limit(1 << 40), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(cached)
    mx.set_memory_limit(memory)
    return cached, memory


@contextmanager
def _set(budget: int, working: int, wire: bool) -> Iterator[None]:
    least = _LEAST_CACHE if memory_size() >= 16 * 10**9 else _SMALLEST_CACHE
    memory = _tighten(mx.set_memory_limit, budget)
    cached = _tighten(mx.set_cache_limit, min(max(int(1.5 * working), least), budget // 2))
    wired = None
    try:
        if wire and mx.metal.is_available():
            wired = mx.set_wired_limit(min(budget, usable_memory()))
        yield
    finally:
        mx.set_cache_limit(cached)
        mx.set_memory_limit(memory)
        if wired is not None:
            mx.set_wired_limit(wired)
        mx.clear_cache()


def _tighten(set_limit: Callable[[int], int], nbytes: int) -> int:
    """Sets one of MLX's limits unless somebody has set a tighter one; returns the old limit."""
    before = set_limit(nbytes)
    if before < nbytes and before != _CPU_CACHE:
        set_limit(before)
    return before
