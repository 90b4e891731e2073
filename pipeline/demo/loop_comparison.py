"""The first steps of a student that learns from stored targets, taken again with the teacher in the loop."""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.demo.teacher_in_the_loop import TeacherInTheLoop
from pipeline.run_file import RunFile
from pipeline.runtime.interruption import Interrupted
from pipeline.training import train
from stages.student.run_folder import RunFolder
from stages.student.stage_config import StageName
from storage.digests import parse_object
from storage.progress import Progress
from storage.regular_files import read_regular
from storage.strict_model import StrictModel

STAGE: StageName = "dft"
TERMS = ("lm", "kd", "attention")


class LoopComparison(StrictModel):
    """Two trainings that differ in where the teacher's side of the loss comes from."""

    steps: int
    largest_difference: dict[str, float]
    """Of each term over these steps, relative to the value with the teacher in the loop."""
    step_s: dict[str, float]
    """Seconds a step, by what was trained."""


def compare_with_loop(runs: Mapping[str, RunFile], name: str, steps: int, progress: Progress) -> LoopComparison:
    """Trains the first steps of a finished student's `dft` stage with the bundled teacher in the loop.

    Args:
        runs: settings of finished students, with a line of metrics for every step.
        name: which of them; it learns by all three terms.
        steps: how many.
        progress: shows the training.
    """
    folders = {name: RunFolder(Path(str(run.output))) for name, run in runs.items()}
    trained, folder = folders[name], RunFolder(folders[name].path.parent / "teacher-in-the-loop")
    if not folder.stage(STAGE).checkpoints.is_dir():
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.copytree(trained.stage("dpt").path, folder.stage("dpt").path)
        run = runs[name].model_copy(update={"output": str(folder.path)})
        passes_a_step = math.ceil(run.train.stage(STAGE).batch_size / run.train.loader.microbatch_size)
        last = TeacherInTheLoop.num_forward + steps * passes_a_step

        def is_done() -> bool:
            return TeacherInTheLoop.num_forward >= last

        # As it is asked to, after so many steps of all that the learning rate is planned for.
        with suppress(Interrupted):
            train(run, [STAGE], progress, is_done, objective=TeacherInTheLoop)
    looped, stored = (_first_steps(one, steps) for one in (folder, trained))
    return LoopComparison(
        steps=len(looped),
        largest_difference={
            term: max(abs(a[term] / b[term] - 1) for a, b in zip(stored, looped, strict=True)) for term in TERMS
        },
        step_s={
            name: _step_s(_first_steps(of_name, steps))
            for name, of_name in {**folders, "teacher in the loop": folder}.items()
        },
    )


def _first_steps(folder: RunFolder, steps: int) -> list[dict[str, float]]:
    path = folder.stage(STAGE).path / "metrics.jsonl"
    lines = read_regular(path).splitlines()[:steps]
    return [parse_object(line, str(path), "remove the folder of this student and run again") for line in lines]


def _step_s(lines: list[dict[str, float]]) -> float:
    """Without the first, in which loader processes start."""
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / max(len(lines) - 1, 1)
