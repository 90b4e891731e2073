"""Finds the checkpoint that a name stands for: of a training run, a folder, or a hub id."""

from pathlib import Path

from stages.checkpoints.resolve import resolve_checkpoint
from stages.student.run_folder import RunFolder, StageFolder
from stages.student.stage_config import STAGES
from storage.errors import UserError
from storage.stores import open_store
from storage.stores.recognize import what_lies_at


def find_checkpoint(model: str) -> Path:
    """The student of a training run's last stage, otherwise the folder or hub id itself.

    Raises:
        UserError: If no stage of the run has finished, or there is no such checkpoint.
    """
    run, stage = RunFolder(Path(model)), StageFolder(Path(model))
    if run.holds_stages:
        return run.last_student()
    if students := [one.name for one in _runs_below(run.path)]:
        raise UserError(f"{model} is the folder of a sweep; name one of its students, such as {run.path / students[0]}")
    return stage.student if (stage.student / "config.json").is_file() else resolve_checkpoint(model)


def find_runs(path: Path) -> list[Path]:
    """The training run at a place, or those of a sweep's folder, by name; also those that are not finished.

    Raises:
        UserError: If there is none.
    """
    if not (found := [path] if RunFolder(path).holds_stages else _runs_below(path)):
        instead = what_lies_at(open_store(path)) or "nothing"
        todo = "name the --output of `cdp train-student`, or of one of its sweeps"
        raise UserError(f"{path} holds no training run: {instead} is there; {todo}")
    return found


def _runs_below(path: Path) -> list[Path]:
    below = sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
    return [one for one in below if RunFolder(one).holds_stages]


def which_student(model: str) -> list[str]:
    """Says which student of a training run `find_checkpoint` takes, and warns if a later stage began; else empty.

    Raises:
        UserError: If no stage has finished.
    """
    run = RunFolder(Path(model))
    if not run.holds_stages:
        return []
    student = run.last_student()
    used = run.finished()[-1]
    begun = [name for name in STAGES[STAGES.index(used) + 1 :] if run.stage(name).is_begun]
    notes = [f"student: {student}, of {used}, the last stage that finished"]
    if begun:
        notes.append(
            f"warning: {' and '.join(begun)} of {model} began and did not finish, so this student lacks what it "
            "trained; run `cdp train-student` again to go on with it"
        )
    return notes
