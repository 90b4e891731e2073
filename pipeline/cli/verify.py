"""`cdp verify`: check, repair, extract again."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.extract_teacher import extract_targets
from pipeline.cli.options import ConfigOption, SamplesOption, TargetsArgument
from storage.errors import UserError

if TYPE_CHECKING:
    from storage.integrity.findings import VerifyReport
    from storage.integrity.repair import RepairReport


def verify(
    targets: TargetsArgument,
    samples: SamplesOption = None,
    sample: Annotated[
        str, typer.Option(help="Share of the shards whose chunks are read; all records and sizes always are.")
    ] = "100%",
    seed: Annotated[int, typer.Option(help="Which shards that share is; another seed reads others.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move broken parts to quarantine, to be extracted again.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="With --repair and --samples: extract them again now, with this teacher.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Checks every commit, file, chunk and count. Ends with exit code 1 when anything is wrong."""
    from pipeline.preflight import check_holds_samples, check_holds_targets

    percent = _percent(sample)
    check_holds_targets(targets)
    if samples is not None:
        check_holds_samples(samples)
    again = {"teacher.checkpoint": teacher, "samples": samples, "targets": targets} if teacher or config else None
    if again is not None:
        _check_again(config, again, repair=repair)

    from storage.integrity.repair import repair as repair_store

    report = _check(targets, samples, percent, seed)
    if report.findings and repair:
        repaired = repair_store(report)
        _print_repair(repaired, report)
        if repaired.moved and again is not None:
            extract_targets(config, [], again)
            report = _check(targets, samples, percent, seed)
    if report.findings:
        raise typer.Exit(1)


def _percent(text: str) -> float:
    with suppress(ValueError):
        if 0 < (percent := float(text.removesuffix("%"))) <= 100:
            return percent
    raise UserError(f"--sample is {text!r}, expected a percentage above 0 and at most 100, such as 5%")


def _check_again(config: Path | None, flags: dict[str, Any], *, repair: bool) -> None:
    """Refuses an extraction that could not follow the repair, before anything is moved."""
    from pipeline.preflight import check_samples, check_teacher
    from pipeline.run_file import load_run_file, need

    if not repair:
        raise UserError("--teacher and --config say how broken parts are made again, which takes --repair; add it")
    run = load_run_file(config, [], flags)
    check_samples(need(run.samples, "--samples"))
    check_teacher(need(run.teacher, "--teacher"))


def _check(targets: str, samples: str | None, percent: float, seed: int) -> "VerifyReport":
    from pipeline.ui.progress import progress_display
    from storage.integrity.verify import verify as verify_store

    with progress_display() as progress:
        report = verify_store(targets, samples, percent=percent, seed=seed, progress=progress)
    _print_report(report)
    return report


def _print_report(report: "VerifyReport") -> None:
    """Prints every finding, or that there is none; which shards were not read, and which are not there yet."""
    from rich.table import Column, Table
    from rich.text import Text

    from pipeline.ui.console import results
    from pipeline.ui.tables import size_text
    from storage.printable import printable

    amount = f"{report.num_files:,} files, {size_text(report.num_bytes)}, {report.num_samples:,} samples"
    if report.num_read < report.num_committed:
        amount += f" in the {report.num_read:,} shards that were read; of the others records and sizes"
    if report.missing:
        first = ", ".join(map(str, report.missing[:5])) + (", ..." if len(report.missing) > 5 else "")
        results.print(
            f"not finished: {len(report.missing):,} of {report.num_planned:,} shards are not committed ({first}); "
            "run `cdp extract-teacher`"
        )
    if report.ok:
        counts = f": {report.num_committed} of {report.num_planned} shards, {amount} checked"
        results.print(Text.assemble(("whole", "green"), counts))
        results.print("not checked: reports/ and quarantine/, which are no part of the data and have no digests")
        return
    columns = [Column(name, overflow="fold") for name in ("shard", "file", "found", "expected")]
    table = Table(*columns, title=f"{len(report.findings)} findings in {amount}")
    for finding in report.findings:
        table.add_row(printable(str(finding.part)), printable(finding.file), finding.found, finding.expected)
    results.print(table)


def _print_repair(repaired: "RepairReport", report: "VerifyReport") -> None:
    """Prints what was moved to quarantine and what remains to be done."""
    from pipeline.ui.console import results
    from pipeline.ui.tables import print_facts
    from storage.printable import printable

    if repaired.folder:
        where = f"quarantine: {report.targets_url}/{repaired.folder}"
        print_facts(where, [("moved", path) for path in repaired.moved])
        results.print("To extract what is missing, with the settings of the first time, run", soft_wrap=True)
        where = f"--samples {report.samples_url or 'SAMPLES'} --targets {report.targets_url}"
        results.print(f"  cdp extract-teacher --teacher TEACHER {where}", soft_wrap=True)
    for finding in repaired.left:
        results.print(
            f"not moved: {printable(str(finding.part))} {printable(finding.file)}; samples are restored or packed "
            "again, a shard without a record is made by the next extraction, a strange file is removed by hand",
            soft_wrap=True,
        )
