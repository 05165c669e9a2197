"""Whether this process can still work. Decides what `/health` answers and when the server exits.

After a lack of memory the GPU works as before, and the next successful job clears the fault. After any other fault
macOS may soon refuse the process, and only a new process helps. Without one of its ranks a server cannot work.
"""

from __future__ import annotations

from ..errors import GPUError, RankError

_MAX_LASTING = 2  # faults, other than a lack of memory, that end the process


class Health:
    """The faults of this process.

    Attributes:
        fault: the last fault, as a sentence; empty if there is none. A successful job clears a lack of memory; any
            other fault stays.
        over: the fault that should end the process: the GPU refuses it, or has failed twice for a reason other than
            memory, or a rank has ended.
    """

    def __init__(self) -> None:
        self.fault: str = ""
        self.over: GPUError | RankError | None = None
        self._lasting = 0

    def failed(self, error: GPUError | RankError) -> None:
        """Records a fault."""
        self.fault = str(error)
        lasting = isinstance(error, RankError) or error.fault != "memory"
        self._lasting += lasting
        fatal = isinstance(error, RankError) or error.fatal
        if self.over is None and (fatal or self._lasting >= _MAX_LASTING):
            self.over = error

    def succeeded(self) -> None:
        """Records a successful job."""
        if not self._lasting:
            self.fault = ""
