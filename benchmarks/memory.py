"""The memory that a step of this process needs at its highest. Linux only.

`ru_maxrss` does not tell: a new process inherits its parent's peak through `exec`, and what it needs below that is
not seen. The kernel's own mark, `VmHWM`, can be set back.
"""

import ctypes
from pathlib import Path

_RESET_PEAK = "5"
"""What `/proc/self/clear_refs` takes to make the peak what is resident now (proc(5))."""


class PeakMemory:
    """Counts from when it is made, and anew after `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin from what is resident now, less what the allocator holds though it is free."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._before = _peak_bytes()

    @property
    def grown_bytes(self) -> int:
        """Resident bytes at the highest since then, beyond those at its begin; memory given back meanwhile counts."""
        return _peak_bytes() - self._before


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")
