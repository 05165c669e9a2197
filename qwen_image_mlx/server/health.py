"""Whether the GPU still works for this process. Decides what `/health` answers and when the server exits.

After a lack of memory the GPU works as before, and the next successful job clears the fault. After any other fault
macOS may soon refuse the process, and only a new process helps.
"""

from __future__ import annotations

from ..errors import GPUError

_MAX_LASTING = 2  # faults, other than a lack of memory, that end the process


class Health:
    """The GPU faults of this process.

    Attributes:
        fault: the last fault, as a sentence; empty if there is none. A successful job clears a lack of memory; any
            other fault stays.
        over: whether the process should end: the GPU refuses it, or has failed twice for a reason other than
            memory.
    """

    def __init__(self) -> None:
        self.fault: str = ""
        self.over: bool = False
        self._lasting = 0

    def failed(self, error: GPUError) -> None:
        """Records a fault."""
        self.fault = str(error)
        self._lasting += error.fault != "memory"
        self.over = self.over or error.fatal or self._lasting >= _MAX_LASTING

    def succeeded(self) -> None:
        """Records a successful job."""
        if not self._lasting:
            self.fault = ""
