"""What MLX 0.32.4 does around Metal's kernels: buffers, their cache, command buffers, limits; and a kernel's time."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE = 16384  # bytes
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A Mac, and how MLX is set on it.

    Attributes:
        name: of the chip.
        bandwidth: bytes/s of its memory.
        flops: FLOP/s of half-precision products at their peak.
        flops32: the same in fp32; None for the same rate, as on all chips without neural accelerators.
        cache_limit: bytes that `mx.set_cache_limit` lets MLX keep.
        memory_limit: bytes of active memory beyond the weights above which MLX waits; None for no limit.
        winograd: whether 3x3 convolutions may be Winograd's (`MLX_CONV_WINOGRAD`).
        ops, elements: a command buffer is committed when it has more kernels, or touches more elements (without their
            size: MLX_MAX_OPS_PER_BUFFER, MLX_MAX_MB_PER_BUFFER). MLX takes 50 and 50 Mi on Max and Ultra chips.
        in_flight: committed command buffers that MLX lets run before it waits.
    """

    name: str = "M1 Max"
    bandwidth: float = 400e9
    flops: float = 10.4e12
    flops32: float | None = None
    cache_limit: float = 64 * GIB
    memory_limit: float | None = None
    winograd: bool = True
    ops: int = 40
    elements: int = 40 << 20
    in_flight: int = 10


# Public figures. M5's FLOP are what its neural accelerators were seen to reach, over the efficiency of a product.
MACHINES = (
    Machine("M1, 8 cores", 68e9, 2.6e12),
    Machine("M1 Max", 400e9, 10.4e12),
    Machine("M4", 120e9, 4.3e12),
    Machine("M4 Max", 546e9, 18e12),
    Machine("M5", 153e9, 15e12, 4.6e12),
    Machine("M5 Max", 614e9, 62e12, 18.5e12),
)

# Parts of the nominal rate that a kernel reaches, and seconds that one takes at least.
BANDWIDTH_REACHED = 0.8
LAUNCH = 4e-6
REACHED = {"product": 0.8, "quantized product": 0.65, "attention": 0.7, "winograd product": 0.6, "convolution": 0.6}


@dataclass(eq=False)
class Buffer:
    """Memory; freed when no array and no command buffer uses it. What is there from the start is never freed."""

    size: int
    permanent: bool = False
    arrays: int = 0
    commands: int = 0


@dataclass(frozen=True)
class View:
    """An array: its shape and strides in elements, and the buffer it lies in."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    buffer: Buffer

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Bytes of the elements that are really there: a broadcast's are counted once."""
        return self.itemsize * math.prod(d for d, stride in zip(self.shape, self.strides, strict=True) if stride)

    @property
    def span(self) -> int:
        """Elements from the first to the last, those between included (MLX's `data_size`)."""
        return 1 + sum((d - 1) * stride for d, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie side by side in some order."""
        return self.span == self.elements

    @property
    def is_row_contiguous(self) -> bool:
        """Whether they lie in the order of its axes."""
        pairs = zip(self.shape, self.strides, row_strides(self.shape), strict=True)
        return all(stride == row for d, stride, row in pairs if d > 1)


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array in the order of its axes."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass
class Result:
    """What a graph takes.

    Attributes:
        kernels, bytes, times: by kind of kernel; bytes that kernels read and write, seconds.
        peak: most bytes at once, beyond what was there from the start.
        fresh: bytes that had to be asked of macOS because no buffer of the cache fitted.
        fresh_after: `fresh` at the end of each evaluation.
        commands: command buffers.
        longest: seconds of the longest kernel, and its kind.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    times: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    fresh: int = 0
    fresh_after: list[int] = field(default_factory=list)
    commands: int = 0
    longest: tuple[float, str] = (0.0, "")

    @property
    def seconds(self) -> float:
        """Of all kernels, one after another."""
        return self.times.total()


@dataclass
class _Commands:
    """A command buffer: what it keeps, what its kernels touch, and whether MLX counts it among those in flight."""

    buffers: dict[Buffer, None] = field(default_factory=dict)  # in the order of their use
    touched: set[Buffer] = field(default_factory=set)
    ops: int = 0
    elements: int = 0
    counted: bool = True


class Device:
    """MLX's allocator and encoder for Metal."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.result = Result()
        self.active = 0
        self._cache: list[int] = []  # sizes, least recently used first
        self._open = _Commands()
        self._flying: deque[_Commands] = deque()

    # Memory: MetalAllocator::malloc and free, BufferCache.

    def allocate(self, nbytes: int) -> Buffer:
        """A buffer out of the cache, if one is there that is not much larger, else a fresh one."""
        nbytes = max(1, nbytes)
        size = nbytes if nbytes <= PAGE else -(-nbytes // PAGE) * PAGE
        fitting = [cached for cached in self._cache if size <= cached < min(2 * size, size + 2 * PAGE)]
        if fitting:
            size = min(fitting)
            self._cache.remove(size)
        else:
            if self.machine.memory_limit is not None:
                self._shrink(self.active + sum(self._cache) + size - self.machine.memory_limit)
            self.result.fresh += size
        self.active += size
        self.result.peak = max(self.result.peak, self.active)
        self._shrink(sum(self._cache) - self.machine.cache_limit)
        return Buffer(size)

    def _shrink(self, excess: float) -> None:
        if excess > 0.9 * sum(self._cache):
            self._cache.clear()
        while excess > 0 and self._cache:
            excess -= self._cache.pop(0)

    def keep(self, buffer: Buffer) -> None:
        """One more array uses the buffer."""
        buffer.arrays += 1

    def drop(self, buffer: Buffer) -> None:
        """One array less uses the buffer."""
        buffer.arrays -= 1
        self._free(buffer)

    def _free(self, buffer: Buffer) -> None:
        if buffer.permanent or buffer.arrays or buffer.commands:
            return
        self.active -= buffer.size
        if sum(self._cache) < self.machine.cache_limit:
            self._cache.append(buffer.size)

    # Command buffers: CommandEncoder, gpu::eval, the waits in eval_impl.

    def use(self, buffer: Buffer) -> None:
        """The open command buffer keeps the buffer until it is done."""
        if buffer not in self._open.buffers:
            self._open.buffers[buffer] = None
            buffer.commands += 1

    def kernel(
        self,
        kind: str,
        reads: Sequence[View],
        writes: Sequence[View],
        flops: float = 0,
        reached: float | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Encodes a kernel.

        Args:
            kind: what it is counted as.
            reads, writes: its arrays.
            flops: floating-point operations of a product, attention or convolution.
            reached: part of the chip's rate that it reaches; None takes the kind's.
            nbytes: what it moves, if not all of its arrays.
        """
        for view in (*reads, *writes):
            if view.buffer not in self._open.touched:
                self._open.touched.add(view.buffer)
                self._open.elements += view.span
            self.use(view.buffer)
        self._open.ops += 1
        moved = sum(view.stored for view in (*reads, *writes)) if nbytes is None else nbytes
        machine, itemsize = self.machine, max(view.itemsize for view in (*reads, *writes))
        rate = (machine.flops32 or machine.flops) if itemsize == 4 else machine.flops
        computing = flops / (rate * (reached or REACHED[kind])) if flops else 0.0
        seconds = max(moved / (machine.bandwidth * BANDWIDTH_REACHED), computing) + LAUNCH
        result = self.result
        result.kernels[kind] += 1
        result.bytes[kind] += moved
        result.times[kind] += seconds
        result.longest = max(result.longest, (seconds, kind))

    def after_primitive(self) -> None:
        """Commits a full command buffer, and waits while too many run or too much memory is active."""
        if self._open.ops > self.machine.ops or self._open.elements >> 20 > self.machine.elements >> 20:
            self._commit(counted=True)
        while self._counted and (self._counted > self.machine.in_flight or self._is_over):
            if self._open.ops:
                self._commit(counted=False)
            self._complete_one()

    @property
    def _counted(self) -> int:
        return sum(commands.counted for commands in self._flying)

    @property
    def _is_over(self) -> bool:
        return self.machine.memory_limit is not None and self.active > self.machine.memory_limit

    def _commit(self, counted: bool) -> None:
        self._open.counted = counted
        self._flying.append(self._open)
        self._open = _Commands()
        self.result.commands += 1

    def _complete_one(self) -> None:
        """The next command buffer that MLX counts is done, and those before it."""
        while self._flying:
            commands = self._flying.popleft()
            for buffer in commands.buffers:
                buffer.commands -= 1
                self._free(buffer)
            if commands.counted:
                return

    def end_evaluation(self) -> int:
        """Commits what is open; the number of the last command buffer."""
        if self._open.ops or self._open.buffers:
            self._commit(counted=False)
        return self.result.commands

    def wait_for(self, number: int) -> None:
        """Waits for a command buffer, by its number, and all before it."""
        while self._flying and self.result.commands - len(self._flying) < number:
            commands = self._flying.popleft()
            for buffer in commands.buffers:
                buffer.commands -= 1
                self._free(buffer)
