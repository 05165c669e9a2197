"""The processes that `mlx.launch` started together: which one this is, what all agree on, what they exchange.

All transport is `mlx.distributed`'s. Every call of `Ranks` that exchanges is made by all ranks, in the same order. How
work is shared is in `shared.py`. Importable without MLX, which is loaded only if there are several ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .._version import __version__
from ..errors import RankError, RequestError

if TYPE_CHECKING:
    import mlx.core as mx

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

REPORT = logging.INFO + 5  # the level of the line that each rank but the first logs

# Set by mlx.launch's backends (ring, jaccl, nccl), by Open MPI and by MPICH; all tell a process its rank.
_RANK_KEYS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
PATIENCE = 5.0  # seconds that a rank may take to end after a signal
JOINING = 60.0  # seconds that a rank waits for the others to start; MLX itself tries to reach them for half a minute
# What ends a rank that waits longer: a process of its own, because MLX lets no thread of Python run meanwhile. It ends
# when its input does.
_WATCH = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[1]))[0]:
    os.write(2, sys.argv[2].encode())
    os.kill(os.getppid(), signal.SIGTERM)
"""
_ENDS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Begins every error of MLX's backends: backend/*/distributed of MLX 0.32.
_BACKENDS = re.compile(r"\[(ring|jaccl|mpi|nccl|distributed)\]")
_MAX_SHOWN = 60  # characters of a value on which ranks differ
_GREETING = 0x51494D58  # the first thing that ranks of this package say to each other
_MAX_PAYLOAD = 1 << 31  # bytes; more is not what a rank sends
_STRANGERS = "these ranks do not belong together: another mlx.launch may use the same ports of one of these machines"


def launched() -> bool:
    """Whether mlx.launch or MPI started this process; looks at the environment alone."""
    return any(key in os.environ for key in _RANK_KEYS)


def _starts_alone() -> bool:
    """Whether mlx.launch started one process; MLX's ring cannot join itself."""
    file = os.environ.get("MLX_HOSTFILE")
    if file is None:
        return False
    try:
        return len(json.loads(Path(file).read_text().strip() or "[]")) < 2
    except (OSError, ValueError, TypeError):  # MLX says why
        return False


def environment_rank() -> int:
    """The rank that the environment names; 0 without one."""
    return next((int(os.environ[key]) for key in _RANK_KEYS if os.environ.get(key, "").isdecimal()), 0)


def leads() -> bool:
    """Whether this process is the one that writes, prints and serves; looks at the environment alone."""
    return environment_rank() == 0


class Ranks:
    """The ranks of this run.

    Args:
        group: MLX's group; None is a single process.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        meet: called before an exchange of all ranks that one of them may not reach, because its work failed or was
            stopped. It raises if there is one; here it does nothing, because the failing process ends. A server
            replaces it.
        awaited: whether others wait for what only this rank can send, so that it cannot fail alone.
        shared: how the last work was shared, for people: the mode, and each rank's part.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.meet: Callable[[], None] = lambda: None
        self.awaited: bool = False
        self.shared: tuple[str | None, list[str]] = None, []

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, prints and serves."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """MLX's group, for exchanges of arrays."""
        return self._group

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in order of the ranks; the lengths may differ.

        Raises:
            RankError: a rank has ended or cannot be reached.
        """
        if self._group is None:
            return [payload]
        import mlx.core as mx  # here: a single process exchanges nothing
        import numpy as np

        lengths = np.array(self.gathered(mx.array([len(payload)]))).tolist()
        if not all(0 <= length < _MAX_PAYLOAD for length in lengths):
            raise RankError(_STRANGERS, cause="ports")
        padded = np.zeros(max(*lengths, 1), np.uint8)
        padded[: len(payload)] = np.frombuffer(payload, np.uint8)
        rows = np.array(self.gathered(mx.array(padded)[None]))
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def gathered(self, array: mx.array) -> mx.array:
        """Every rank's array of one shape, joined along the first axis, evaluated; raises RankError as `gather`."""
        import mlx.core as mx

        whole = mx.distributed.all_gather(array, group=self._group)
        arrive(whole)
        return whole

    def gather_arrays(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """Every rank's arrays, of any number, shapes and dtypes, by rank, evaluated; raises RankError as `gather`.

        Args:
            arrays: evaluated, because nothing may fail between two exchanges.
        """
        import mlx.core as mx
        import numpy as np

        from ..gpu import finish

        kinds = self.gather_values([[list(array.shape), str(array.dtype).rpartition(".")[2]] for array in arrays])
        payloads = self.gather(b"".join(np.array(array.view(mx.uint8)).tobytes() for array in arrays))
        found: list[list[mx.array]] = []
        for of_rank, payload in zip(kinds, payloads, strict=True):
            data, start = mx.array(np.frombuffer(payload, np.uint8)), 0
            found.append([])
            for shape, name in of_rank:
                dtype = getattr(mx, name)
                end = start + math.prod(shape) * dtype.size
                found[-1].append(data[start:end].view(dtype).reshape(shape))
                start = end
            finish(*found[-1])
        return found

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's value, of JSON's types, in order of the ranks; raises RankError as `gather`."""
        try:
            return [json.loads(payload) for payload in self.gather(json.dumps(value).encode())]
        except ValueError as error:  # not what a rank sends
            raise RankError(_STRANGERS, cause="ports") from error

    def led(self, make: Callable[[], T]) -> T:
        """Rank 0's value, of JSON's types; only rank 0 makes one. Raises RankError as `gather`."""
        if self.size == 1:
            return make()
        value: T = self.gather_values(make() if self.leads else None)[0]
        return value

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises RankError, on every rank with the same sentence, unless all have the same facts.

        Args:
            facts: values of JSON's types, keyed by what a sentence calls them; the keys are the same everywhere.
        """
        everyone = self.gather_values(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise RankError(
                        f"rank {rank} differs from rank 0 in {name}: {_shown(theirs.get(name))}, not {_shown(value)}; "
                        "all ranks need the same package, model files, images and options"
                    )

    def wait(self) -> None:
        """Returns when every rank has called it; raises RankError as `gather`."""
        self.gather(b"")

    @cached_property
    def link(self) -> Link:
        """The measured connection, the same on every rank; measured once, in a fraction of a second."""
        return measured_link(self)


class Link(NamedTuple):
    """A connection between ranks.

    Attributes:
        latency: seconds of the smallest exchange.
        bandwidth: bytes a second that a rank receives in a large one.
    """

    latency: float
    bandwidth: float

    def seconds(self, nbytes: int) -> float:
        """The modelled time of one exchange."""
        return self.latency + nbytes / self.bandwidth


def measured_link(ranks: Ranks, nbytes: int = 4_000_000, rounds: int = 5) -> Link:
    """Measures gathers among all ranks: the shortest of several, because others only add to it.

    Args:
        ranks: at least two.
        nbytes: of the large exchange, from each rank.
        rounds: of each size.
    """
    import mlx.core as mx

    def seconds(count: int) -> float:
        data = mx.zeros((1, count), mx.uint8)
        mx.eval(data)
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            ranks.gathered(data)
            found.append(time.perf_counter() - start)
        return min(found)

    small, large = seconds(1), seconds(nbytes)
    received = nbytes * (ranks.size - 1)
    own = Link(small, received / max(large - small, 1e-9))
    everyone = ranks.gather_values(list(own))
    return Link(max(latency for latency, _ in everyone), min(bandwidth for _, bandwidth in everyone))


@cache
def current() -> Ranks:
    """The ranks that this process is one of; joins the others on the first call.

    Raises:
        RankError: they cannot be reached, or have a different version of this package or of MLX.
    """
    if not launched() or _starts_alone():
        return Ranks()
    import mlx.core as mx

    try:
        with exchanging(), _signals_end(), _watched():
            group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:  # of the hostfile
        reason = " ".join(str(error).split())[:200]
        raise RankError(
            f"the ranks cannot be joined ({reason}): start them with mlx.launch and its hostfile"
        ) from error
    if group.size() == 1:
        return Ranks()
    ranks = Ranks(group)
    greetings = ranks.gathered(mx.array([[_GREETING, ranks.size]]))
    if greetings.tolist() != [[_GREETING, ranks.size]] * ranks.size:
        raise RankError(_STRANGERS, cause="ports")
    ranks.agree({"the version of qwen-image-mlx": __version__, "the version of MLX": mx.__version__})
    return ranks


def arrive(*arrays: mx.array) -> None:
    """Waits for the results of exchanges.

    Each is waited for before the next one begins: MLX may return from a failed one as if nothing were wrong, with any
    numbers, until it synchronizes; and an exchange after a failed one may wait for ever.

    Raises:
        RankError: a rank has ended or cannot be reached.
    """
    from ..gpu import finish  # here, because it loads MLX

    with exchanging():
        finish(*arrays)


@contextmanager
def exchanging() -> Iterator[None]:
    """Inside the block, an error of MLX's backend is raised as RankError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if fault := lost(error):
            raise fault from error
        raise


def lost(error: BaseException) -> RankError | None:
    """The RankError that stands for one of MLX's errors; None if it is not about the connection."""
    if not isinstance(error, RuntimeError | ValueError) or not _BACKENDS.match(str(error)):
        return None
    reason = " ".join(str(error).split()).rstrip(".")
    return RankError(f"another rank has ended or cannot be reached ({reason}): see its own message, and start again")


def alone() -> None:
    """From here on this process, and what it starts, is a run of its own."""
    for key in _RANK_KEYS:
        os.environ.pop(key, None)
    current.cache_clear()


def leave(code: int) -> None:
    """Ends a rank that failed, at once: MLX may wait for the others when Python ends."""
    os._exit(code)


def joined() -> bool:
    """Whether this process has joined the others."""
    return current.cache_info().currsize > 0


@contextmanager
def _signals_end() -> Iterator[None]:
    """Inside the block, a signal ends this process at once.

    MLX waits for the other ranks to connect without letting any thread of Python run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watched() -> Iterator[None]:
    """Ends this process, with a sentence, if the block takes longer than `JOINING`."""
    import subprocess  # here: a single process watches nothing

    rank = environment_rank()
    sentence = (
        f"{f'rank {rank}: ' if rank else ''}error: another rank has not started within {JOINING:.0f} seconds: see what "
        "the ranks print, and start again\n"
    )
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(JOINING), sentence]
    # At the end its input is closed, and it is waited for. Ctrl-C in the terminal is not for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


@contextmanager
def ending(patience: float = PATIENCE) -> Iterator[None]:
    """Inside the block, a signal ends this process at the latest after some seconds.

    Python handles signals between its own instructions, and MLX may wait for a different rank for as long as that one
    computes.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(os, "set_blocking"):
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    done = threading.Event()

    def watch() -> None:
        while data := os.read(reading, 1):
            if data[0] in _ENDS:
                if not done.wait(patience):
                    os._exit(128 + data[0])
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.close(writing)


def parts(count: int, size: int, least: int = 1) -> list[range]:
    """Numbers 0 … count - 1 in consecutive ranges, one for each rank, which differ in length by at most one.

    Raises:
        RequestError: there are too many ranks for each to have `least` numbers.
    """
    if size * least > count:
        each = f", at least {least} each" if least > 1 else ""
        raise RequestError(f"{size} ranks cannot share {count} blocks{each}: start at most {count // least}")
    bounds = [count * rank // size for rank in range(size + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
