"""How the threads of torch wait for each other on a CPU."""

import os


def let_waiting_threads_sleep() -> None:
    """Lets a thread that waits for the others of an operation sleep, in this process and those that it starts.

    By default it spins for milliseconds, on a core that a loader process or another program may need to let the others
    end. A step of a small student has thousands of operations. OpenMP reads the variable when torch is imported, so
    call this before. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
