"""`cdp inspect`."""

from typing import TYPE_CHECKING

from pipeline.cli.options import TargetsArgument

if TYPE_CHECKING:
    from rich.table import Table

    from storage.targets.summary import StoreSummary

SHOWN_OF_FINGERPRINT = (
    "teacher_weights",
    "tokenizer",
    "layers",
    "windows",
    "map_codec",
    "logit_codec",
    "dtype",
    "max_length",
)


def inspect(targets: TargetsArgument) -> None:
    """Shows what a target store holds. Counts shards, samples, maps and bytes of each array; names the teacher."""
    from pipeline.ui.console import results
    from storage.targets.summary import summarize

    summary = summarize(targets)
    results.print(_facts(summary))
    results.print(_arrays(summary))


def _facts(summary: "StoreSummary") -> "Table":
    from rich.markup import escape

    from pipeline.ui.tables import counts_text, facts_table, size_text

    table = facts_table("target store", summary.url)
    table.add_row("shards", f"{summary.num_committed:,} of {summary.num_planned:,}")
    table.add_row("samples", f"{summary.num_samples:,}")
    table.add_row("skipped", counts_text(summary.skipped_by_reason))
    table.add_row("answer rows", f"{summary.num_answer_rows:,}")
    table.add_row("maps", f"{summary.num_maps:,} for {summary.num_map_references:,} samples with an image")
    table.add_row(
        "  once per (image, tokens before it)",
        f"saves {size_text(summary.shared_bytes)}, {summary.sharing_ratio:.2f} times smaller",
    )
    table.add_row("size", size_text(summary.total_bytes))
    table.add_row(
        "raw fp16 maps",
        f"{size_text(summary.raw_square_bytes)} square, {size_text(summary.raw_triangle_bytes)} triangle",
    )
    table.add_row(
        "stored maps",
        f"{size_text(summary.map_bytes)}, {summary.map_square_ratio:.1f} times smaller than raw squares, "
        f"{summary.map_triangle_ratio:.1f} than triangles",
    )
    table.add_row("raw fp16 logits", size_text(summary.raw_logit_bytes))
    table.add_row("ratio to raw", f"{summary.ratio:.1f} times smaller")
    table.add_row("fingerprint", summary.fingerprint_digest)
    for name in SHOWN_OF_FINGERPRINT:
        table.add_row(f"  {name}", escape(str(summary.fingerprint[name])))
    return table


def _arrays(summary: "StoreSummary") -> "Table":
    from rich.table import Table

    table = Table(title="bytes of each array")
    table.add_column("array")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for name, size in sorted(summary.array_bytes.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size:,}", f"{size / max(summary.total_bytes, 1):.1%}")
    return table
