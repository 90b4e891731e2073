"""What a process on a CPU is told before it first multiplies, so that any number of threads gives the same bytes."""

import os
from pathlib import Path


def make_cpu_deterministic() -> None:
    """Makes a matrix product on an Intel CPU the same for any number of threads, and with it of workers.

    MKL reads this when it first multiplies. On other processors it does not keep the promise (measured: AMD EPYC, with
    and without it); there `reproducible_threads` does.
    """
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def reproducible_threads(threads: int) -> int:
    """As many, or one where another number would give other bytes: a resumed run may have fewer workers."""
    return threads if _made_by_intel() else 1


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
