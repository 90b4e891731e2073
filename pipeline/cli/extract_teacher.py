"""`cdp extract-teacher`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ConfigOption, SamplesOption, SetOption, TargetsOption, TeacherOption, TeachersOption

if TYPE_CHECKING:
    from pipeline.extraction.report import ExtractionReport


def extract_teacher(
    teacher: TeacherOption = None,
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: one is started on this machine.")
    ] = None,
    workers: TeachersOption = None,
) -> None:
    """Runs the teacher and stores its targets. This is a Ray job; run it again to make what is missing."""
    flags = {
        "teacher.checkpoint": teacher,
        "samples": samples,
        "targets": targets,
        "extract.ray_address": ray_address,
        "extract.workers": workers,
    }
    extract_targets(config, settings or [], flags)


def extract_targets(config: Path | None, settings: list[str], flags: dict[str, Any]) -> None:
    """Extracts and prints the report; `cdp verify --repair` ends with it, too."""
    from pipeline.preflight import check_extraction
    from pipeline.run_file import load_run_file, need, save_run_file

    run = load_run_file(config, settings, flags)
    teacher = need(run.teacher, "--teacher")
    samples, targets = need(run.samples, "--samples"), need(run.targets, "--targets")
    check_extraction(teacher, samples, targets, run.extract, run.images)

    from pipeline.extraction.extract import extract
    from pipeline.extraction.report import RUN_FILE
    from pipeline.ui.progress import progress_display

    with progress_display() as progress:
        report = extract(
            teacher,
            samples,
            targets,
            run.extract,
            progress,
            lambda store: save_run_file(run, store, RUN_FILE),
            run.images,
        )
    print_report(report, targets)


def print_report(report: "ExtractionReport", targets: str) -> None:
    """Prints what an extraction did."""
    from pipeline.ui.tables import counts_text, cuts_text, print_facts, print_notes, size_text

    facts = [
        ("samples", f"{report.samples:,}"),
        ("skipped", counts_text(report.skipped)),
        (
            "cut at teacher.max_length",
            cuts_text(report.samples, report.cut_samples, report.answer_tokens, report.cut_answer_tokens),
        ),
        ("maps", f"{report.maps:,}"),
        *[("turned by EXIF data", f"{report.turned:,} samples")] * bool(report.turned),
        ("shards", f"{report.shards:,} ({report.shards_made_now:,} made now)"),
        ("size", f"{size_text(report.bytes)}, {size_text(report.bytes / max(report.samples, 1))} a sample"),
        ("time", f"{report.seconds:.1f} s, {report.samples_per_s:.1f} samples/s, workers: {report.workers}"),
    ]
    waited = [worker.waited_share for worker in report.per_worker if worker.waited_share is not None]
    if waited:
        most = f"; of the worker that waited most {max(waited):.1%}" if len(waited) > 1 else ""
        idle = f"{sum(waited) / len(waited):.1%} of the time since their first batch{most}"
        facts.append(("teachers idle", idle))
    if (gpus := report.gpus_per_worker) > 1 and report.tensor_ranks == 1:
        facts.append(("GPUs idle", f"{1 - 1 / gpus:.0%} at least: of {gpus} that hold a teacher one computes at once"))
    if report.failed_tries:
        num_tries = sum(map(len, report.failed_tries.values()))
        facts.append(("failed tries", f"{num_tries:,}, each in reports/extraction.json"))
    if report.failed_starts:
        num_starts = sum(report.failed_starts.values())
        facts.append(("workers that did not start", f"{num_starts:,}, the reasons in reports/extraction.json"))
    print_facts(f"targets: {targets}", facts)
    print_notes(report.notes)
