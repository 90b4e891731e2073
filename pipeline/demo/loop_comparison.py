"""The first steps of students that learn from stored targets, taken alone, and with the teacher in the loop."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.demo.teacher_in_the_loop import TeacherInTheLoop
from pipeline.run_file import RunFile
from pipeline.runtime.interruption import Interrupted
from pipeline.training import train
from pipeline.ui.progress import NamedProgress
from stages.student.run_folder import RunFolder
from stages.student.stage_config import StageName
from stages.student.training.objective import DistillationObjective
from storage.digests import parse_object
from storage.progress import Progress
from storage.regular_files import read_regular
from storage.strict_model import StrictModel

STAGE: StageName = "dft"
TERMS = ("lm", "kd", "attention")
IN_THE_LOOP = "teacher in the loop"


class LoopComparison(StrictModel):
    """Two trainings that differ in where the teacher's side of the loss comes from."""

    steps: int
    largest_difference: dict[str, float]
    """Of each term over these steps, relative to the value with the teacher in the loop."""
    step_s: dict[str, float]
    """Seconds a step, by what was trained."""


def compare_with_loop(
    runs: Mapping[str, RunFile], names: Sequence[str], steps: int, progress: Progress
) -> LoopComparison:
    """Trains first steps of finished students' `dft` stage again, in turn, the last also with the teacher in the loop.

    All are taken by this process alone, so that their times can be compared.

    Args:
        runs: settings of finished students, with a line of metrics for every step.
        names: which of them; the last learns by all three terms.
        steps: how many.
        progress: shows each training under its name.
    """
    taken = {name: _take_steps(runs[name], name, DistillationObjective, steps, progress) for name in names}
    looped = _take_steps(runs[names[-1]], IN_THE_LOOP, TeacherInTheLoop, steps, progress)
    return LoopComparison(
        steps=len(looped),
        largest_difference={
            term: max(abs(a[term] / b[term] - 1) for a, b in zip(taken[names[-1]], looped, strict=True))
            for term in TERMS
        },
        step_s={name: _step_s(lines) for name, lines in {**taken, IN_THE_LOOP: looped}.items()},
    )


def _take_steps(
    run: RunFile, name: str, objective: type[DistillationObjective], steps: int, progress: Progress
) -> list[dict[str, float]]:
    """The metrics of the first steps; they are not taken again where they are there."""
    trained = RunFolder(Path(str(run.output)))
    folder = RunFolder(trained.path.parent.parent / "first-steps" / name)
    if not folder.stage(STAGE).checkpoints.is_dir():
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.copytree(trained.stage("dpt").path, folder.stage("dpt").path)
        # As it is asked to, after so many steps of all that the learning rate is planned for.
        with suppress(Interrupted):
            train(
                run.model_copy(update={"output": str(folder.path)}),
                [STAGE],
                NamedProgress(name, progress),
                lambda: len(_metrics(folder)) >= steps,
                objective=objective,
            )
    return _metrics(folder)[:steps]


def _metrics(folder: RunFolder) -> list[dict[str, float]]:
    path = folder.stage(STAGE).path / "metrics.jsonl"
    lines = read_regular(path).splitlines() if path.is_file() else []
    return [parse_object(line, str(path), "remove the folder of this student and run again") for line in lines]


def _step_s(lines: list[dict[str, float]]) -> float:
    """Without the first, in which loader processes start."""
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / max(len(lines) - 1, 1)
