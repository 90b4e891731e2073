"""A rank that fails as a file says, which the environment names: `FUNCTION memory SAMPLES` or `FUNCTION kill 0`.

In a function of that name it has no memory for more samples than that, or is killed; rank 0 is in the pass by then.
"""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.teacher import rank_process
from stages.teacher.batching import PreparedSample

PLAN = "CDP_TEST_FAILING_RANK"


def _fails(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def failing(teacher: object, *args: Any) -> Any:
        function, how, most = Path(os.environ[PLAN]).read_text().split()
        batch: Sequence[PreparedSample] = args[-1] if name == "run_continuations" else args[0]
        if function == name and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if function == name and len(batch) > int(most):
            raise torch.OutOfMemoryError(f"no room for {len(batch)} samples")
        return run(teacher, *args)

    return failing


if __name__ == "__main__":
    for function in ("run_teacher", "run_prefixes", "run_continuations"):
        setattr(rank_process, function, _fails(function, getattr(rank_process, function)))
    rank_process.main()
