"""Ranks that are threads of this process, for what needs no other process."""

from __future__ import annotations

import threading

from qwen_image_mlx.runtime.ranks import Ranks


class Threads(Ranks):
    """Ranks that are threads of this process: gathers by way of a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, place: list):
        super().__init__()
        self.rank, self.size = rank, size
        self._barrier, self._place = barrier, place

    def gather(self, payload: bytes) -> list[bytes]:
        self._place[self.rank] = payload
        self._barrier.wait(5)
        found = list(self._place)
        self._barrier.wait(5)
        return found


def together(size, work):
    """The results of `work(ranks)` on each of some ranks; an exception is its result."""
    barrier, place, results = threading.Barrier(size), [b""] * size, [None] * size

    def one(rank):
        try:
            results[rank] = work(Threads(rank, size, barrier, place))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results
