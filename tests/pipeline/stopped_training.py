"""Training that stops at a step before it is saved, as a process of torchrun.

    python -m tests.pipeline.stopped_training STAGE STEP SAMPLES TARGETS STUDENT OUTPUT SETTING...

It ends with 0 when it was stopped there.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from pipeline.training import train
from stages.student.stage_config import StageName
from tests.pipeline.runs import run_file
from tests.pipeline.test_training import Stopped, stop_at

if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, step = cast("StageName", sys.argv[1]), int(sys.argv[2])
    samples, targets, student, output = map(Path, sys.argv[3:7])
    data = SimpleNamespace(samples=samples, student_lm=student)
    try:
        train(run_file(data, targets, output, *sys.argv[7:]), [stage], stop_at(stage, step))
    except Stopped:
        sys.exit(0)
    sys.exit("the stage came to its end")
