"""`cdp report`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import SamplesOption, TargetsOption, TeacherOption, can_be_saved, input_path, save
from storage.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `cdp train-student`, also of its sweeps.")],
    html: Annotated[Path, typer.Option(callback=can_be_saved, help="File to save the page in.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of `cdp evaluate`, of a run or of another model; repeatable.")
    ] = None,
    teacher_results: Annotated[
        list[Path] | None, typer.Option(help="Folder of `cdp evaluate` of the teacher; repeatable.")
    ] = None,
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    teacher: TeacherOption = None,
    pictures: Annotated[int, typer.Option(help="Samples whose attention is shown, at most.", min=1)] = 8,
) -> None:
    """Writes one HTML page about training runs. Shows accuracy, losses, attention on pictures, targets and settings.

    Attention is shown with --samples and --targets; that of the teacher from words with --teacher, which then loads.
    """
    from pipeline.checkpoints import find_runs
    from pipeline.preflight import check_pairing, check_teacher
    from stages.evaluation.result_folders import results_below

    for path in runs:
        input_path(path)
        find_runs(path)
    for path in (*(results or ()), *(teacher_results or ())):
        input_path(path)
        results_below(path)
    if (samples is None) != (targets is None):
        raise UserError("--samples and --targets belong together; give both for pictures, or neither")
    if samples is not None and targets is not None:
        check_pairing(samples, targets)
    if teacher is not None:
        if samples is None:
            raise UserError("--teacher shows its attention on pictures, which need --samples and --targets; give both")
        from stages.teacher.config import TeacherConfig

        check_teacher(TeacherConfig(checkpoint=teacher))

    from pipeline.report.build import ReportInputs, build_page
    from pipeline.ui.console import results as shown
    from pipeline.ui.progress import progress_display
    from pipeline.ui.report.render import render_page
    from pipeline.ui.tables import size_text

    inputs = ReportInputs(runs, results or (), teacher_results or (), samples, targets, teacher, pictures)
    with progress_display() as progress:
        page = render_page(build_page(inputs, progress=progress))
    save(html, page)
    shown.print(f"report: {html} ({size_text(len(page.encode()))})")
