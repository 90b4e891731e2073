"""`cdp train-student`: one student, or all of a sweep."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.options import ConfigOption, SamplesOption, SetOption, TargetsOption, input_path, save
from pipeline.runtime.interruption import RESUME, SAVED_EXIT_CODE, Interrupted, remembered

if TYPE_CHECKING:
    from pipeline.run_file import RunFile
    from pipeline.sweep_file import Sweep
    from pipeline.ui.tables import ReportTable
    from stages.student.run_folder import StageReport
    from storage.progress import Progress


def train_student(
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    student: Annotated[
        str | None,
        typer.Option(help="Decoder: folder, hub id, GGUF file; with --vision own a whole model."),
    ] = None,
    vision: Annotated[
        Literal["teacher", "own"] | None,
        typer.Option(help="Whose vision tower: the teacher's (teacher adapter fetching, TAF), or the student's own."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    stage: Annotated[
        Literal["all", "dpt", "dft", "sft"] | None,
        typer.Option(help="One stage, or all three in a row; default: train.stages of the run file."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint; else begin a new run.")] = True,
    ray_address: Annotated[str | None, typer.Option(help="Train on this Ray cluster, with Ray Train.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes of Ray Train; default: one a GPU.")] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(callback=input_path, help="YAML of several students, trained and compared."),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(
            min=1, help="Students of the sweep that train at the same time; each takes a GPU, or a share of the cores."
        ),
    ] = 1,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Trains a student from stored targets. Runs one stage or several in a row, resumes, never loads the teacher."""
    from pipeline.preflight import check_training
    from pipeline.run_file import load_run_file, need
    from pipeline.ui.progress import progress_display
    from stages.student.stage_config import STAGES
    from storage.errors import UserError

    flags = {
        "samples": samples,
        "targets": targets,
        "student": student,
        "output": output,
        "train.stages": [name for name in STAGES if stage in ("all", name)] or None,
        "train.vision": vision,
        "train.cluster.ray_address": ray_address,
        "train.cluster.workers": workers,
    }
    if sweep is not None:
        _train_sweep(sweep, config, settings or [], flags, at_once, resume=resume)
        return
    if at_once > 1:
        raise UserError("--at-once is for the students of a sweep; name its file with --sweep")
    run = load_run_file(config, settings or [], flags)
    check_training(run, resume=resume)
    with progress_display() as progress:
        reports = _train_stages(run, progress, resume=resume)
    _print_reports(reports, need(run.output, "--output"))


def _train_stages(run: "RunFile", progress: "Progress", *, resume: bool, more: bool = False) -> "list[StageReport]":
    """Trains here, or on a Ray cluster when the run names one.

    Args:
        run: all settings.
        progress: where the stages are shown.
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


def _train_sweep(
    path: Path, config: Path | None, settings: list[str], flags: dict[str, Any], at_once: int, *, resume: bool
) -> None:
    """Trains all students of a sweep file and prints one table; exit code 1 if one failed."""
    from pipeline.preflight import check_sweep
    from pipeline.sweep_file import check_at_once, load_sweep
    from pipeline.ui.streams import say

    sweep = load_sweep(path, config, settings, flags)
    if at_once > 1:
        check_at_once(sweep)
    for note in check_sweep(sweep, resume=resume):
        say(note)

    from pipeline.students_at_once import students_at_once
    from pipeline.sweep import in_turn, run_sweep, sweep_table
    from pipeline.ui.progress import NamedProgress, progress_display
    from pipeline.ui.tables import print_table

    def train_here(name: str, run: "RunFile") -> "list[StageReport]":
        return _train_stages(run, NamedProgress(name, progress), resume=resume, more=True)

    with progress_display() as progress:
        trainings = (
            students_at_once(sweep, at_once, progress, resume=resume) if at_once > 1 else in_turn(sweep, train_here)
        )
        report = run_sweep(sweep, trainings, progress)
    print_table(sweep_table(report))
    if sweep.compare.pictures is not None and report.students:
        _save_page(sweep, list(report.students))
    for name, reason in report.failures.items():
        say(f"error: student {name} failed: {reason}")
    if report.failures:
        raise typer.Exit(1)


def _save_page(sweep: "Sweep", students: list[str]) -> None:
    """Writes the page of all students, in one process of those that trained together."""
    from pipeline.report.build import sweep_page
    from pipeline.sweep_file import SWEEP_PAGE
    from pipeline.ui.console import is_main_process, results
    from pipeline.ui.progress import progress_display
    from pipeline.ui.report.render import render_page

    if is_main_process:
        with progress_display() as progress:
            page = render_page(sweep_page(sweep, students, progress))
        save(sweep.output / SWEEP_PAGE, page)
        results.print(f"report: {sweep.output / SWEEP_PAGE}")


def _print_reports(reports: "list[StageReport]", folder: str) -> None:
    from pipeline.ui.tables import OF_LOSSES, ReportTable, print_notes, print_table

    terms = _terms([report.losses for report in reports])
    header = ["stage", "steps", "samples", "trained", "rate", "waited", *terms.values()]
    rows = [
        [
            report.stage,
            f"{report.steps:,}",
            f"{report.samples:,}",
            f"{report.trained_parameters:,}",
            f"{report.samples_per_s:.1f}/s",
            f"{report.wait_share:.1%}",
            *_loss_cells(report.losses, terms),
        ]
        for report in reports
    ]
    print_table(ReportTable(f"student in {folder}; {OF_LOSSES}", header, rows))
    if any(report.validation for report in reports):
        print_table(_validation_table(reports))
    print_notes(dict.fromkeys(note for report in reports for note in report.notes))


def _validation_table(reports: "list[StageReport]") -> "ReportTable":
    from pipeline.ui.tables import ReportTable

    terms = _terms([report.validation.losses for report in reports if report.validation is not None])
    header = ["stage", "held out", *terms.values(), "in all", "share of time"]
    rows = [
        [
            report.stage,
            f"{found.samples:,}",
            *_loss_cells(found.losses, terms),
            f"{found.losses['loss']:.3f}",
            f"{found.time_share:.1%}",
        ]
        for report in reports
        if (found := report.validation) is not None
    ]
    return ReportTable("validation losses at the end of each stage, on samples held out of training", header, rows)


def _terms(losses: list[dict[str, float]]) -> dict[str, str]:
    """The columns of losses, by term; that of answer attention only where a stage learned from it."""
    terms = {"lm": "LM", "kd": "KD", "attention": "attention"}
    return terms | {"answer_attention": "from answers"} if any("answer_attention" in one for one in losses) else terms


def _loss_cells(losses: dict[str, float], terms: dict[str, str]) -> list[str]:
    return [f"{losses[name]:.3f}" if name in losses else "-" for name in terms]
