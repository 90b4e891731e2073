"""Makes a CPU give the same bytes for any number of threads."""

import os
from pathlib import Path


def make_cpu_deterministic() -> None:
    """Makes a matrix product on an Intel CPU the same for any number of threads, and so of workers.

    MKL reads the variable at its first product, so call this before. On other processors it does not help (measured on
    an AMD EPYC); there `reproducible_threads` does.
    """
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def reproducible_threads(threads: int) -> int:
    """Gives the threads to use: one where their number changes bytes, since a resumed run may have fewer."""
    return threads if _made_by_intel() else 1


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
