"""How ranks share a step: each computes a branch of guidance, or some of the blocks, and all get the velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import Cancelled
from ..gpu import finish
from ..models.layers import OnLayer
from ..pipeline.seams import DividedDenoiser, PassInParts
from .ranks import Ranks, arrive, exchanging


class _SharedDenoiser(PassInParts):
    """What the shared `DividedDenoiser`s have in common: ranks compute parts of a pass, and all get the velocities.

    Args:
        ranks: of this run.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def agreed(self, skips: bool) -> bool:
        """As `DividedDenoiser.agreed`: rank 0 decides, because chips may differ in the last bit."""
        self._ranks.meet()
        return self._ranks.led(lambda: skips)


class GuidanceDenoiser(_SharedDenoiser):
    """Runs one branch and gets the other from a different rank, in one exchange an evaluation.

    Args:
        ranks: the rank's number is that of its branch.
        own: the `DividedDenoiser` of this rank's branch; None for a rank without one.
        branches: how many there are.
    """

    def __init__(self, ranks: Ranks, own: DividedDenoiser | None, branches: int):
        super().__init__(ranks)
        self._own, self._all = own, branches
        self._branches = branches  # of this evaluation
        self._nothing = mx.zeros((0,))  # of the latents' shape, from `enter` on

    def enter(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Any:
        """As `DividedDenoiser.enter`."""
        self._branches, self._nothing = branches or self._all, mx.zeros_like(latents)
        return _Nothing([self._nothing]) if self._own is None else self._own.enter(latents, evaluation)

    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None = None) -> Any:
        """As `DividedDenoiser.run`; outside the guidance's interval the negative branch is left out."""
        return hidden if self._used is None else self._used.run(hidden, evaluation, blocks, on_layer)

    def leave(self, hidden: Any, evaluation: int) -> Sequence[mx.array]:
        """As `DividedDenoiser.leave`, after the exchange."""
        own = self._nothing
        if self._used is not None:
            (own,) = self._used.leave(hidden, evaluation)
            finish(own)  # it may fail, and then there is nothing to exchange
        self._ranks.meet()
        return mx.split(self._ranks.gathered(own), self._ranks.size)[: self._branches]

    def signal(self, hidden: Any, evaluation: int) -> mx.array:
        """As `DividedDenoiser.signal`, of the own branch: only rank 0's counts."""
        found: mx.array = hidden.targets[0] if self._own is None else self._own.signal(hidden, evaluation)
        return found

    @property
    def _used(self) -> DividedDenoiser | None:
        """The denoiser of this rank's branch, if this evaluation has that branch."""
        return self._own if self._ranks.rank < self._branches else None


class _Nothing(NamedTuple):
    """The `Hidden` of a rank without a branch."""

    targets: Sequence[mx.array]

    def with_targets(self, targets: Sequence[mx.array]) -> _Nothing:
        """See `Hidden`."""
        return _Nothing(targets)


class LayersDenoiser(_SharedDenoiser):
    """Blocks that are spread over ranks: the streams go from each to the next (`RankRelay`), the velocities to all.

    Args:
        ranks: in order of their blocks.
        denoiser: the `DividedDenoiser` of this rank's blocks. What it makes of the streams is the velocity on the last.
        relay: its transformer's.
    """

    def __init__(self, ranks: Ranks, denoiser: DividedDenoiser, relay: RankRelay):
        super().__init__(ranks)
        self._denoiser, self._relay = denoiser, relay
        self._cancelled: Cancelled | None = None

    def enter(self, latents: mx.array, evaluation: int, branches: int | None = None) -> Any:
        """As `DividedDenoiser.enter`."""
        return self._denoiser.enter(latents, evaluation, branches)

    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: OnLayer | None = None) -> Any:
        """As `DividedDenoiser.run`, of those blocks that are this rank's."""

        def on_own_layer(arrays: Sequence[mx.array]) -> None:
            try:
                if on_layer is not None:
                    on_layer(arrays)
            except Cancelled as error:  # the others wait for the streams: it is cancelled after this evaluation
                self._cancelled = error

        if blocks.stop is None:  # else the ranks decide how to go on before they wait for each other
            self._begin()
        else:
            assert blocks.stop < self._relay.blocks.stop  # nothing is sent yet
        hidden = self._denoiser.run(hidden, evaluation, blocks, on_own_layer)
        self._relay.wait()
        return hidden

    def leave(self, hidden: Any, evaluation: int) -> Sequence[mx.array]:
        """As `DividedDenoiser.leave`, after the exchange."""
        self._begin()
        found = mx.concatenate(self._denoiser.leave(hidden, evaluation))
        everyone = self._ranks.gathered(found)
        self._ranks.awaited, cancelled, self._cancelled = False, self._cancelled, None
        if cancelled is not None:
            raise cancelled
        return mx.split(everyone[-len(found) :], len(found))

    def signal(self, hidden: Any, evaluation: int) -> mx.array:
        """As `DividedDenoiser.signal`, of the first block here: only rank 0's counts."""
        return self._denoiser.signal(hidden, evaluation)

    def _begin(self) -> None:
        """From here on, until the exchange of an evaluation, the others wait for this rank."""
        if not self._ranks.awaited:
            self._ranks.meet()
            self._ranks.awaited = True


class RankRelay:
    """The `Relay` of a rank: one message a branch from the rank before it, one to the next.

    Args:
        ranks: in order of their blocks.
        blocks: the numbers of this rank's.

    Attributes:
        blocks: the numbers of this rank's.
        sent: bytes sent to the next rank so far.
    """

    def __init__(self, ranks: Ranks, blocks: range):
        self._ranks, self.blocks = ranks, blocks
        self.sent: int = 0
        self._sending: mx.array | None = None

    def receive(self, block: int, streams: Sequence[mx.array]) -> list[mx.array]:
        """See `Relay.receive`."""
        if self._ranks.rank == 0 or block != self.blocks.start:
            return list(streams)
        lengths = np.cumsum([x.shape[1] for x in streams]).tolist()
        shape = (streams[0].shape[0], lengths[-1], streams[0].shape[2])
        whole = mx.distributed.recv(shape, streams[0].dtype, self._ranks.rank - 1, group=self._ranks.group)
        arrive(whole)
        return mx.split(whole, lengths[:-1], axis=1)

    def send(self, block: int, streams: Sequence[mx.array]) -> None:
        """See `Relay.send`."""
        if self._ranks.rank + 1 == self._ranks.size or block != self.blocks.stop:
            return
        self.wait()
        whole = mx.concatenate(list(streams), axis=1)
        with exchanging():
            # On its way while the next branch runs here; in the order in which the next rank receives.
            self._sending = mx.distributed.send(whole, self._ranks.rank + 1, group=self._ranks.group)
            mx.async_eval(self._sending)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        self.sent += whole.nbytes

    def wait(self) -> None:
        """Waits until what was sent is on its way; raises RankError if it cannot be sent."""
        if self._sending is not None:
            arrive(self._sending)
            self._sending = None
