"""Whether the GPU still works for this process: what `/health` says, and when the server gives up.

After a fault of memory the GPU is as good as before, and the next job that succeeds shows it. After any other, macOS
may soon refuse the process, and nothing but a new process helps.
"""

from __future__ import annotations

from ..errors import GPUError

_MOST = 2  # faults other than of memory that end the process


class Health:
    """The faults of the GPU that a process has met.

    Attributes:
        fault: the last one, a sentence; empty while all is well. One of memory is forgotten when a job succeeds; any
            other is never.
        over: whether the process is to end: the GPU refuses it, or failed for the second time for another reason than
            memory.
    """

    def __init__(self) -> None:
        self.fault: str = ""
        self.over: bool = False
        self._lasting = 0

    def failed(self, error: GPUError) -> None:
        """Notes a fault."""
        self.fault = str(error)
        self._lasting += error.fault != "memory"
        self.over = self.over or error.fatal or self._lasting >= _MOST

    def succeeded(self) -> None:
        """Notes a job that came to its end."""
        if not self._lasting:
            self.fault = ""
