"""Checks that all processes that train a stage together see the same run folder.

Each process reads there what the stage starts from and how far it is. One that saw another folder would take the wrong
samples, and wait for the others for ever.
"""

import socket
import time
from collections.abc import Callable
from hashlib import sha256

from accelerate import Accelerator
from accelerate.utils import gather_object

from stages.student.run_folder import REPORT_FILE, STAGE_FILE
from stages.student.training.checkpoint import Position, list_checkpoints
from stages.student.training.resume_guard import start_weights
from stages.student.training.stage_run import StageRun
from storage.errors import UserError
from storage.stores import open_store

LOOKS = 45
"""How often the processes look before they give up, a second apart. A machine may keep what it saw of a network file
system for half a minute."""
PAUSE_S = 1.0


def check_same_folder(accelerator: Accelerator, run: StageRun) -> None:
    """Compares what the processes see of a stage and of what it starts from; all must call this.

    Raises:
        UserError: In all processes, if they do not see the same.
    """
    _compare(accelerator, run, lambda: _seen(run), LOOKS)


def check_same_position(accelerator: Accelerator, run: StageRun, position: Position) -> None:
    """Compares the step that the processes go on from; as `check_same_folder`."""
    _compare(accelerator, run, lambda: {"whole checkpoint": f"of step {position.step}"}, looks=1)


def _compare(accelerator: Accelerator, run: StageRun, look: Callable[[], dict[str, str]], looks: int) -> None:
    if accelerator.num_processes == 1:
        return
    views: list[tuple[str, dict[str, str]]] = []
    # All processes get the same list, so that all look equally often.
    for number in range(looks):
        if number:
            time.sleep(PAUSE_S)
        views = gather_object([(f"{run.output} on {socket.gethostname()}", look())])
        if all(seen == views[0][1] for _, seen in views):
            return
    other = next(process for process, (_, seen) in enumerate(views) if seen != views[0][1])
    differing = [name for name, value in views[0][1].items() if views[other][1][name] != value]
    said = [
        f"process {process} sees in {place}: " + ", ".join(f"{name} {seen[name]}" for name in differing)
        for process, (place, seen) in ((0, views[0]), (other, views[other]))
    ]
    raise UserError(
        f"the processes that train together do not see the same run folder; {'; '.join(said)}. Name an --output that "
        "all of them see, such as a folder of a network file system"
    )


def _seen(run: StageRun) -> dict[str, str]:
    store, checkpoints = open_store(run.output), list_checkpoints(run.folder.checkpoints)
    start = "the decoder" if run.initial is None else f"{run.initial} ({(start_weights(run) or 'missing')[:12]})"
    return {
        STAGE_FILE: sha256(store.read(STAGE_FILE)).hexdigest()[:12] if store.exists(STAGE_FILE) else "missing",
        "start": start,
        "newest checkpoint": checkpoints[-1].name if checkpoints else "none",
        REPORT_FILE: "there" if store.exists(REPORT_FILE) else "missing",
    }
