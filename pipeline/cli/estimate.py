"""`cdp estimate`."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    ConfigOption,
    ReportOption,
    SamplesOption,
    SetOption,
    TeacherOption,
    TeachersOption,
    save,
)

if TYPE_CHECKING:
    from pipeline.run_file import RunFile
    from stages.estimate.report import Estimate, TeacherMemory
    from stages.teacher.config import TeacherConfig


def estimate(
    teacher: TeacherOption = None,
    samples: SamplesOption = None,
    workers: TeachersOption = None,
    config_only: Annotated[bool, typer.Option("--config-only", help="Coarse, without the teacher's weights.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Shows so many samples as tokens, answers marked.")] = 0,
    report: ReportOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Estimates what an extraction will cost. Gives bytes and GPU-hours of each setting, from a few samples."""
    from pipeline.preflight import check_samples, check_teacher
    from pipeline.run_file import load_run_file, need

    flags = {"teacher.checkpoint": teacher, "samples": samples, "extract.workers": workers}
    run = load_run_file(config, settings or [], flags)
    asked, samples = need(run.teacher, "--teacher"), run.samples if config_only else need(run.samples, "--samples")
    if samples is not None:
        check_samples(samples)
    if show:
        need(run.samples, "--samples")
    check_teacher(asked, with_weights=not config_only)

    from pipeline.extraction.estimation import make_estimate
    from pipeline.ui.progress import progress_display

    if show:
        _show_samples(asked, need(run.samples, "--samples"), run, show)
    with progress_display() as progress:
        result = make_estimate(
            asked, samples, run.extract, run.estimate, run.images, config_only=config_only, progress=progress
        )
    _print_facts(result)
    _print_settings(result)
    save(report, result.to_json())


def _show_samples(teacher: "TeacherConfig", samples: str, run: "RunFile", num_samples: int) -> None:
    from pipeline.ui.sample_view import print_tokens, tokens_text
    from pipeline.ui.tables import print_facts
    from stages.estimate.preview import preview_samples
    from storage.samples.sample_set import SampleSet
    from storage.targets.commits import SkippedSample

    for found in preview_samples(teacher, SampleSet.open(samples), run.estimate, num_samples, run.images):
        if isinstance(found, SkippedSample):
            print_facts(f"sample {found.key}", [("unusable", f"{found.reason}: {found.detail}")])
            continue
        lost = f"{found.num_cut_tokens:,} tokens after these, {found.num_cut_answer_tokens:,} of them of answers"
        lost += f", and {found.num_cut_images:,} of its images" if found.num_cut_images else ""
        facts = [("tokens", tokens_text(found.runs)), ("cut", lost if found.num_cut_tokens else "no")]
        print_facts(f"sample {found.key}", facts)
        print_tokens(found.runs)


def _print_facts(estimate: "Estimate") -> None:
    from pipeline.ui.tables import counts_text, cuts_text, print_facts, size_text

    read = f"{estimate.num_sampled:,} read, {estimate.num_measured:,} through the teacher"
    mean, more = estimate.per_sample, estimate.answer_row_bytes != estimate.answer_row_bytes_at_1
    tokens_per_map = mean["image_tokens"] / mean["maps"] if mean["maps"] else 0
    kept = round(mean["answer_rows"] * estimate.num_sampled)
    cuts = cuts_text(estimate.num_sampled, estimate.cut_samples, kept, estimate.cut_answer_tokens)
    chosen = estimate.settings[estimate.chosen]
    of_answers = chosen.bytes_by_array.get("answer_attention")
    facts = [
        ("samples", f"{estimate.num_samples:,} in {estimate.num_shards:,} shards ({read})"),
        ("unusable among them", counts_text(estimate.unusable)),
        *(("", example) for example in estimate.unusable_examples),
        ("cut at teacher.max_length", cuts),
        (
            "a sample has",
            (
                f"{mean['tokens']:,.1f} tokens, {mean['answer_rows']:,.1f} answer rows, {mean['maps']:.3f} maps of "
                f"{tokens_per_map:,.0f} image tokens"
            ),
        ),
        ("teacher", f"{1000 * estimate.teacher_seconds_per_sample:,.1f} ms a sample on {estimate.device}"),
        *([] if estimate.memory is None else [("GPUs of a teacher", _memory_text(estimate.memory))]),
        ("objects", f"{estimate.num_shards * estimate.files_per_shard:,}"),
        (
            "an answer row",
            f"{estimate.answer_row_bytes:,} bytes"
            + (f" ({estimate.answer_row_bytes_at_1:,} without teacher.temperatures)" if more else ""),
        ),
        (
            "answer rows",
            ", ".join(f"k {k}: {size_text(size)}" for k, size in estimate.answer_bytes_by_top_k.items()),
        ),
        *(
            ()
            if of_answers is None
            else [("answer attention", f"{size_text(of_answers)}, {of_answers / chosen.shard_bytes:.1%} of the shards")]
        ),
        *(("note", note) for note in estimate.notes),
    ]
    print_facts(f"estimate: {estimate.teacher} over {estimate.samples_url or 'samples to come'}", facts)


def _memory_text(memory: "TeacherMemory") -> str:
    from pipeline.ui.tables import size_text

    needed = "too few, one for each layer," if memory.gpus is None else f"{memory.gpus:,}"
    return (
        f"{needed} of {size_text(memory.gpu_bytes)}, in batches of {memory.batch_size:,} "
        f"({memory.batches_in_flight:,} in flight): weights "
        f"{size_text(memory.weight_bytes)}, activations {size_text(memory.activation_bytes)} on each, maps "
        f"{size_text(memory.map_bytes)}, caches {size_text(memory.cache_bytes)}; at most "
        f"{size_text(memory.bytes_per_gpu)} on one"
    )


def _print_settings(estimate: "Estimate") -> None:
    from pipeline.ui.tables import ReportTable, print_table, size_text

    rows = [
        [
            f"{name} (chosen)" if name == estimate.chosen else name,
            size_text(setting.shard_bytes),
            "-" if setting.shard_bytes_95 is None else " to ".join(map(size_text, setting.shard_bytes_95)),
            size_text(setting.shard_bytes / estimate.num_samples),
            size_text(setting.store_bytes),
            f"{setting.worker_seconds * estimate.gpus_per_worker / 3600:,.3g}",
            str(timedelta(seconds=round(setting.wall_seconds))),
        ]
        for name, setting in estimate.settings.items()
    ]
    hours = "core-hours" if estimate.device == "CPU" else "GPU-hours"
    header = ["map codec", "shards", "95 % interval", "a sample", "whole store", hours, "wall time"]
    of_gpus = f", each of {estimate.gpus_per_worker} GPUs" if estimate.gpus_per_worker > 1 else ""
    title = f"a whole extraction, workers: {estimate.workers}{of_gpus}"
    print_table(ReportTable(title, header, rows, emphasized=f"{estimate.chosen} (chosen)"))
