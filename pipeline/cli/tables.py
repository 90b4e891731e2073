"""What the commands print: reports as tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from pipeline.ui.html_report import ReportTable
from pipeline.ui.progress import add_bar, is_main_process

if TYPE_CHECKING:
    # Only named here: `cdp inspect` need not load what trains students.
    from pipeline.extraction import ExtractionReport
    from stages.convert.checkpoint import ConversionReport
    from stages.estimate.report import Estimate
    from stages.evaluation.report import EvaluationReport
    from stages.evaluation.similarity import AttentionSimilarity
    from stages.export.model_card import ExportReport
    from stages.samples.pack import PackReport
    from stages.student.training.stage import StageReport, StepProgress
    from storage.inspect import StoreSummary
    from storage.repair import RepairReport
    from storage.verify import VerifyReport

output = Console(quiet=not is_main_process)
"""Results, on standard output."""


class TrainingBars:
    """One bar a stage, with its newest losses."""

    def __init__(self, progress: Progress, student: str = "") -> None:
        self._progress = progress
        self._student = student
        self._bars: dict[str, TaskID] = {}

    def __call__(self, stage: str, step: StepProgress) -> None:
        """Shows one optimizer step."""
        if stage not in self._bars:
            self._bars[stage] = add_bar(
                self._progress, f"{self._student} {stage}".strip(), step.num_steps, unit="steps"
            )
        shown = [f"{name} {step.losses[name]:.3f}" for name in ("lm", "kd", "attention") if name in step.losses]
        self._progress.update(self._bars[stage], completed=step.step, note=" ".join(shown))


def print_pack_report(report: PackReport, folder: Path) -> None:
    """Samples, shards, what was left out."""
    table = _plain("samples", str(folder))
    table.add_row("samples", f"{report.num_samples:,} ({report.num_text_only:,} without an image)")
    table.add_row("distinct images", f"{report.num_images:,}")
    table.add_row("shards", f"{report.num_shards:,}, {_size(report.num_bytes)}")
    table.add_row("skipped", _reasons(report.num_skipped))
    table.add_row("time", f"{report.seconds:.1f} s")
    output.print(table)


def print_estimate(estimate: Estimate) -> None:
    """What was looked at, then bytes and hours of each setting; the one that would be used is marked."""
    hours = "core-hours" if estimate.device == "CPU" else "GPU-hours"
    looked = f"{estimate.num_sampled:,} read, {estimate.num_measured:,} through the teacher"
    table = _plain("estimate", f"{estimate.teacher} over {estimate.samples_url or 'samples to come'}")
    table.add_row("samples", f"{estimate.num_samples:,} in {estimate.num_shards:,} shards ({looked})")
    table.add_row("unusable among them", _reasons(estimate.unusable))
    for example in estimate.unusable_examples:
        table.add_row("", f"[yellow]{escape(example)}[/]")
    each = estimate.per_sample
    tokens_a_map = each["image_tokens"] / each["maps"] if each["maps"] else 0
    table.add_row(
        "a sample has",
        f"{each['tokens']:,.1f} tokens, {each['answer_rows']:,.1f} answer rows, {each['maps']:.3f} maps of "
        f"{tokens_a_map:,.0f} image tokens",
    )
    table.add_row(
        "teacher", f"{1000 * estimate.teacher_seconds_per_sample:,.1f} ms a sample on {escape(estimate.device)}"
    )
    table.add_row("objects", f"{estimate.num_shards * estimate.files_per_shard:,}")
    rows = ", ".join(f"k {k}: {_size(size)}" for k, size in estimate.answer_bytes_by_top_k.items())
    table.add_row("answer rows", rows)
    for note in estimate.notes:
        table.add_row("note", escape(note))
    output.print(table)
    settings = Table(title=f"a whole extraction, workers: {estimate.workers}")
    for column in ("map codec", "shards", "95 % interval", "a sample", "whole store", hours, "wall time"):
        settings.add_column(column, justify="left" if column == "map codec" else "right")
    for name, setting in estimate.settings.items():
        interval = "-" if setting.shard_bytes_95 is None else " to ".join(map(_size, setting.shard_bytes_95))
        settings.add_row(
            name + (" (chosen)" if name == estimate.chosen else ""),
            _size(setting.shard_bytes),
            interval,
            _size(setting.shard_bytes / estimate.num_samples),
            _size(setting.store_bytes),
            f"{setting.worker_seconds / 3600:,.3g}",
            str(timedelta(seconds=round(setting.wall_seconds))),
            style="bold" if name == estimate.chosen else None,
        )
    output.print(settings)


def print_conversion_report(report: ConversionReport, folder: Path) -> None:
    """Type, tensors, where the processor is from."""
    table = _plain("checkpoint", str(folder))
    table.add_row("type", f"{report.layout} -> {report.model_type}, {report.dtype}")
    table.add_row("weights", f"{report.tensors:,} tensors, {_size(report.bytes)}")
    table.add_row("image token", f"{report.image_token_id}, {report.added_rows} rows added to the vocabulary for it")
    missing = "none found, so no processor was written; convert again into a new folder with --tokenizer"
    table.add_row("tokenizer", report.tokenizer_from or f"[yellow]{missing}[/]")
    table.add_row("image processor", report.image_processor_from)
    table.add_row("time", f"{report.seconds:.1f} s")
    output.print(table)


def print_export_report(report: ExportReport, folder: Path) -> None:
    """Class, size, what was folded and what it changed."""
    table = _plain("export", str(folder))
    code = f" of {report.custom_code} in it (trust_remote_code=True)" if report.custom_code else " of transformers"
    table.add_row("class", report.model_class + code)
    table.add_row("weights", f"{report.parameters:,} parameters, {report.dtype}, {_size(report.bytes)}")
    table.add_row("post-connector", report.post_connector)
    rounded = ""
    if report.dtype != report.trained_dtype:
        rounded = f" ({report.rounding_error:.2g} by rounding from {report.trained_dtype} alone)"
    table.add_row("logits", f"{report.logit_error:.2g} off at most{rounded}, the largest is {report.logit_scale:.3g}")
    table.add_row("image token", f"{report.image_token_id}, {report.added_rows} rows added to the vocabulary")
    table.add_row("time", f"{report.seconds:.1f} s")
    output.print(table)


def print_extraction_report(report: ExtractionReport, folder: str) -> None:
    """Samples, maps, bytes, rate."""
    table = _plain("targets", folder)
    table.add_row("samples", f"{report.samples:,}")
    table.add_row("skipped", _reasons(report.skipped))
    table.add_row("maps", f"{report.maps:,}")
    table.add_row("shards", f"{report.shards:,} ({report.shards_made_now:,} made now)")
    table.add_row("size", f"{_size(report.bytes)}, {_size(report.bytes / max(report.samples, 1))} a sample")
    table.add_row("time", f"{report.seconds:.1f} s, {report.samples_per_s:.1f} samples/s, workers: {report.workers}")
    waited = [worker.waited_share for worker in report.per_worker if worker.waited_share is not None]
    if waited:
        most = f"; of the worker that waited most {max(waited):.1%}" if len(waited) > 1 else ""
        table.add_row("teachers idle", f"{sum(waited) / len(waited):.1%} of the time since their first batch{most}")
    if report.failed_tries:
        table.add_row(
            "failed tries", f"{sum(map(len, report.failed_tries.values())):,}, each in reports/extraction.json"
        )
    if report.failed_starts:
        count = sum(report.failed_starts.values())
        table.add_row("workers that did not start", f"{count:,}, the reasons in reports/extraction.json")
    output.print(table)
    for note in report.notes:
        output.print(f"note: {escape(note)}")


def print_training_reports(reports: list[StageReport], folder: Path) -> None:
    """A line a stage."""
    table = Table(title=f"student in {escape(str(folder))}")
    for column in (
        "stage",
        "steps",
        "samples",
        "trained",
        "rate",
        "waited",
        "LM",
        "KD",
        "attention",
    ):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for report in reports:
        losses = [f"{report.losses[name]:.3f}" if name in report.losses else "-" for name in ("lm", "kd", "attention")]
        table.add_row(
            report.stage,
            f"{report.steps:,}",
            f"{report.samples:,}",
            f"{report.trained_parameters:,}",
            f"{report.samples_per_s:.1f}/s",
            f"{report.wait_share:.1%}",
            *losses,
        )
    output.print(table)
    for note in {note for report in reports for note in report.notes}:
        output.print(f"note: {escape(note)}")


def print_evaluation(reports: Mapping[str, EvaluationReport]) -> None:
    """Accuracy of each kind in percent, models side by side; half the width of the 95 % interval behind it."""
    first = next(iter(reports.values()))
    table = Table(title=f"accuracy in percent ({first.scoring}, 95 % interval)")
    table.add_column("kind")
    table.add_column("pairs", justify="right")
    for name in reports:
        table.add_column(escape(name), justify="right")
    for kind, result in first.kinds.items():
        cells = []
        for report in reports.values():
            low, high = report.kinds[kind].interval_95
            cells.append(f"{report.kinds[kind].accuracy:.1%} [{low:.0%}, {high:.0%}]".replace("%", ""))
        table.add_row(kind, str(result.num_pairs), *cells)
    averages = [f"{100 * report.average:.1f}" for report in reports.values()]
    table.add_section()
    table.add_row("average", str(first.num_pairs), *averages, style="bold")
    output.print(table)


def similarity_table(result: AttentionSimilarity) -> ReportTable:
    """A line for each matched pair of layers, and their mean."""
    pairs = zip(result.student_layers, result.windows, result.similarity, result.alignment_loss, strict=True)
    rows = [
        [str(layer), ", ".join(map(str, window)), f"{similarity:.3f}", f"{loss:.4f}"]
        for layer, window, similarity, loss in pairs
    ]
    which = "layers as trained" if result.layers_from == "training" else "layers matched by default"
    return ReportTable(
        f"attention similarity over {result.num_samples} samples, {which}",
        ["student layer", "teacher layers", "similarity", "alignment loss"],
        [*rows, ["average", "", f"{result.mean:.3f}", ""]],
    )


def print_page_table(content: ReportTable) -> None:
    """The same table on the terminal."""
    table = Table(title=content.title)
    for number, name in enumerate(content.header):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=not number)
    for row in content.rows:
        table.add_row(*map(escape, row), style="bold" if row[0] == "average" else None)
    output.print(table)


def print_similarity(result: AttentionSimilarity) -> None:
    """How alike student and teacher look."""
    print_page_table(similarity_table(result))


def print_store_summary(summary: StoreSummary) -> None:
    """What a target store holds."""
    table = _plain("target store", summary.url)
    table.add_row("shards", f"{summary.num_committed:,} of {summary.num_planned:,}")
    table.add_row("samples", f"{summary.num_samples:,}")
    table.add_row("skipped", _reasons(summary.skipped_by_reason))
    table.add_row("answer rows", f"{summary.num_answer_rows:,}")
    table.add_row("maps", f"{summary.num_maps:,} for {summary.num_map_references:,} samples with an image")
    table.add_row(
        "  once per (image, tokens before it)",
        f"saves {_size(summary.shared_bytes)}, {summary.sharing_ratio:.2f} times smaller",
    )
    table.add_row("size", _size(summary.total_bytes))
    table.add_row(
        "raw fp16 maps",
        f"{_size(summary.raw_square_bytes)} square, {_size(summary.raw_triangle_bytes)} triangle",
    )
    table.add_row(
        "stored maps",
        f"{_size(summary.map_bytes)}, {summary.map_square_ratio:.1f} times smaller than raw squares, "
        f"{summary.map_triangle_ratio:.1f} than triangles",
    )
    table.add_row("raw fp16 logits", _size(summary.raw_logit_bytes))
    table.add_row("ratio to raw", f"{summary.ratio:.1f} times smaller")
    table.add_row("fingerprint", summary.fingerprint_digest)
    for name in (
        "teacher_weights",
        "tokenizer",
        "layers",
        "windows",
        "map_codec",
        "logit_codec",
        "dtype",
        "max_length",
    ):
        table.add_row(f"  {name}", escape(str(summary.fingerprint[name])))
    output.print(table)
    arrays = Table(title="bytes by array")
    arrays.add_column("array")
    arrays.add_column("bytes", justify="right")
    arrays.add_column("share", justify="right")
    for name, size in sorted(summary.array_bytes.items(), key=lambda item: -item[1]):
        arrays.add_row(name, f"{size:,}", f"{size / max(summary.total_bytes, 1):.1%}")
    output.print(arrays)


def print_verify_report(report: VerifyReport) -> None:
    """Every finding, or that there is none; which shards were not read, and which are not there yet."""
    amount = f"{report.num_files:,} files, {_size(report.num_bytes)}, {report.num_samples:,} samples"
    if report.num_read < report.num_committed:
        amount += f" in the {report.num_read:,} shards that were read; of the others records and sizes"
    if report.missing:
        first = ", ".join(map(str, report.missing[:5])) + (", ..." if len(report.missing) > 5 else "")
        output.print(
            f"not finished: {len(report.missing):,} of {report.num_planned:,} shards are not committed ({first}); "
            "run `cdp extract-teacher`"
        )
    if report.ok:
        output.print(f"[green]whole[/]: {report.num_committed} of {report.num_planned} shards, {amount} checked")
        output.print("not checked: reports/ and aside/, which are no part of the data and have no digests")
        return
    table = Table(title=f"{len(report.findings)} findings in {amount}")
    for column in ("shard", "file", "found", "expected"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        table.add_row(*map(escape, (finding.shard, finding.file, finding.found, finding.expected)))
    output.print(table)


def print_repair_report(repaired: RepairReport, report: VerifyReport) -> None:
    """What was set aside, what remains to be done."""
    if repaired.folder:
        table = _plain("set aside", f"{report.targets_url}/{repaired.folder}")
        for path in repaired.moved:
            table.add_row("moved", escape(path))
        output.print(table)
        output.print("What is missing is extracted, with the settings of the first time, by", soft_wrap=True)
        places = f"--samples {report.samples_url or 'SAMPLES'} --targets {report.targets_url}"
        output.print(f"  cdp extract-teacher --teacher TEACHER {escape(places)}", soft_wrap=True)
    for finding in repaired.left:
        output.print(
            f"not set aside: {escape(finding.shard)} {escape(finding.file)}; samples are restored or packed again, "
            "a shard without a record is made by the next extraction",
            soft_wrap=True,
        )


def _plain(title: str, place: str) -> Table:
    table = Table(title=f"{title}: {escape(place)}", show_header=False)
    table.add_column()
    table.add_column()
    return table


def _reasons(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    return f"{sum(counts.values()):,} (" + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items()) + ")"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
