"""`cdp pack-samples`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import input_path, output_folder

if TYPE_CHECKING:
    from stages.samples.pack import PackReport
    from stages.samples.record_counts import RecordCounts


def pack_samples(
    source: Annotated[
        Path,
        typer.Argument(
            callback=input_path,
            help="JSON, JSON lines, .gz of these, Parquet, or a saved data set.",
            metavar="DATA",
        ),
    ],
    images: Annotated[
        Path,
        typer.Argument(
            callback=input_path, help="Folder that the records' image paths start from; - if they hold their images."
        ),
    ],
    output: Annotated[Path, typer.Argument(callback=output_folder, help="New folder of sample shards.", metavar="OUT")],
    samples_per_shard: Annotated[int, typer.Option(help="Most samples of a shard.")] = 512,
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of a shard.")] = 256 * 2**20,
    max_skipped_fraction: Annotated[float, typer.Option(help="Fraction of samples that may be unusable.")] = 0.0,
) -> None:
    """Packs conversations and images into shards. Conversations of the same image lie side by side."""
    from pipeline.ui.progress import progress_display
    from stages.samples.pack import PackConfig
    from stages.samples.pack import pack_samples as pack
    from stages.settings import validated

    flags = {
        "max_samples_per_shard": samples_per_shard,
        "max_shard_bytes": shard_bytes,
        "max_skipped_fraction": max_skipped_fraction,
    }
    config = validated(PackConfig, flags, "the flags of pack-samples")
    with progress_display() as progress:
        report = pack(source, None if str(images) == "-" else images, output, config, progress)
    _print_report(report, output)


def _print_report(report: "PackReport", folder: Path) -> None:
    from pipeline.ui.tables import counts_text, print_facts, size_text

    facts = [
        ("samples", f"{report.num_samples:,} ({report.num_text_only:,} without an image)"),
        ("distinct images", f"{report.num_images:,} ({report.num_turned:,} turned by EXIF data)"),
        ("shards", f"{report.num_shards:,}, {size_text(report.num_bytes)}"),
        ("skipped", counts_text(report.num_skipped)),
        *_record_facts(report.records),
        ("time", f"{report.seconds:.1f} s"),
    ]
    print_facts(f"samples: {folder}", facts)


def _record_facts(records: "RecordCounts") -> list[tuple[str, str]]:
    """What is only said where there is something to say."""
    unread = ", ".join(f"{key}: {count:,}" for key, count in records.num_unread.items())
    counts = {
        "repeated records": records.num_repeated_records,
        "repeated ids": records.num_repeated_ids,
        "first answers left out": records.num_answers_dropped,
        "<image> read as text": records.num_placeholders_as_text,
    }
    facts = [(name, f"{count:,}") for name, count in counts.items() if count]
    return [("keys not read", unread), *facts] if unread else facts
