"""Work that several commands share, or that has more than one step: bars while it goes on, its report at the end.

Each function imports what it needs: `cdp verify` need not load what trains.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import need
from pipeline.interruption import RESUME, SAVED_EXIT_CODE, Interrupted, remembered
from storage.errors import UserError

if TYPE_CHECKING:
    from pipeline.cli.tables import TrainingBars
    from pipeline.run_file import RunFile
    from stages.student.run_folder import StageReport
    from storage.verify import VerifyReport


def extract_targets(config: Path | None, settings: list[str], flags: dict[str, Any]) -> None:
    """`cdp extract-teacher`, and what follows a repair."""
    from pipeline.cli.tables import print_extraction_report
    from pipeline.extraction import extract
    from pipeline.run_file import load_run_file
    from pipeline.ui.progress import ExtractionBar, bars

    run = load_run_file(config, settings, flags)
    if run.teacher is None:
        raise UserError("--teacher is missing; give the flag or set teacher.checkpoint in the run file")
    places = need(run.samples, "--samples"), need(run.targets, "--targets")
    with bars() as progress:
        report = extract(run.teacher, *places, run.extract, ExtractionBar(progress))
    print_extraction_report(report, places[1])


def train_stages(run: "RunFile", progress: "TrainingBars", *, resume: bool, more: bool = False) -> "list[StageReport]":
    """Here, or on a Ray cluster when the run names one.

    Args:
        run: all settings.
        progress: the bars.
        resume: see `train`.
        more: whether there is work after this. Then a request to stop that came too late for it is not forgotten.
    """
    on_ray = run.train.cluster.ray_address is not None or run.train.cluster.workers is not None
    if on_ray:
        from pipeline.training_on_ray import train_on_ray as train
    else:
        from pipeline.training import train
    with remembered(signal.SIGTERM, signal.SIGINT) as asked_to_stop:
        reports = train(run, run.train.stages, progress, asked_to_stop, resume=resume)
        if more and asked_to_stop():
            raise Interrupted(
                signal.SIGTERM, f"stopped after {run.output}, which is finished; {RESUME}", SAVED_EXIT_CODE
            )
    return reports


def train_sweep(
    path: Path,
    config: Path | None,
    settings: list[str],
    flags: dict[str, Any],
    *,
    resume: bool,
) -> bool:
    """All students of a sweep file, one table; whether none failed."""
    from pipeline.cli.tables import TrainingBars, print_page_table
    from pipeline.sweep import run_sweep, sweep_table
    from pipeline.sweep_file import load_sweep
    from pipeline.ui.progress import bars

    sweep = load_sweep(path, config, settings, flags)
    with bars() as progress:

        def train_one(name: str, run: "RunFile") -> "list[StageReport]":
            return train_stages(run, TrainingBars(progress, name), resume=resume, more=True)

        report = run_sweep(sweep, train_one, progress)
    print_page_table(sweep_table(report))
    for name, reason in report.failures.items():
        say(f"error: student {name} failed: {reason}")
    return not report.failures


def verify_targets(targets: str, samples: str | None, percent: float, seed: int) -> "VerifyReport":
    """One check, its findings printed."""
    from pipeline.cli.tables import print_verify_report
    from pipeline.ui.progress import add_bar, bars
    from storage.verify import verify as verify_store

    with bars() as progress:
        bar = add_bar(progress, "verify", unit="shards")

        def show(done: int, total: int, _num_bytes: int) -> None:
            progress.update(bar, completed=done, total=total)

        report = verify_store(targets, samples, show, percent=percent, seed=seed)
    print_verify_report(report)
    return report


def say_which_student(model: str) -> None:
    """Which of a training run's students a command uses."""
    from pipeline.evaluation import which_student

    for note in which_student(model):
        say(note)


def say(message: str) -> None:
    """On standard error, beside the bars."""
    print(message, file=sys.stderr)
