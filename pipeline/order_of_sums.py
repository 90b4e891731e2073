"""What a process on a CPU is told before it first multiplies, so that any number of threads gives the same bytes."""

import os
from pathlib import Path


def fix_order_of_sums() -> None:
    """Makes a matrix product on a CPU the same for any number of threads, and with it of workers.

    MKL reads this when it first multiplies, and keeps the promise on Intel's processors. On those of AMD it splits sums
    by threads when it is asked (measured: EPYC), and does not when it is left alone.
    """
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
