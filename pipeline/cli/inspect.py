"""`cdp inspect`."""

from pipeline.cli.options import TargetsArgument

SHOWN = [
    "teacher_weights",
    "tokenizer",
    "layers",
    "windows",
    "map_codec",
    "logit_codec",
    "dtype",
    "max_length",
    "images",
]
"""Fields of the fingerprint."""


def inspect(targets: TargetsArgument) -> None:
    """Shows what a target store holds. Counts shards, samples, maps and bytes of each array; names the teacher."""
    from pipeline.ui.tables import ReportTable, counts_text, print_facts, print_table, size_text
    from storage.targets.summary import summarize

    summary = summarize(targets)
    facts = [
        ("shards", f"{summary.num_committed:,} of {summary.num_planned:,}"),
        ("samples", f"{summary.num_samples:,}"),
        ("skipped", counts_text(summary.skipped_by_reason)),
        ("answer rows", f"{summary.num_answer_rows:,}"),
        ("maps", f"{summary.num_maps:,} for {summary.num_map_references:,} samples with an image"),
        (
            "  once per (image, tokens before it)",
            f"saves {size_text(summary.shared_bytes)}, {summary.sharing_ratio:.2f} times smaller",
        ),
        ("size", size_text(summary.total_bytes)),
        (
            "raw fp16 maps",
            f"{size_text(summary.raw_square_bytes)} square, {size_text(summary.raw_triangle_bytes)} triangle",
        ),
        (
            "stored maps",
            (
                f"{size_text(summary.map_bytes)}, {summary.map_square_ratio:.1f} times smaller than raw squares, "
                f"{summary.map_triangle_ratio:.1f} than triangles"
            ),
        ),
        ("raw fp16 logits", size_text(summary.raw_logit_bytes)),
        ("ratio to raw", f"{summary.ratio:.1f} times smaller"),
        ("fingerprint", summary.fingerprint_digest),
        *((f"  {name}", str(summary.fingerprint[name])) for name in SHOWN),
    ]
    print_facts(f"target store: {summary.url}", facts)
    arrays = [
        [name, f"{size:,}", f"{size / max(summary.total_bytes, 1):.1%}"]
        for name, size in sorted(summary.array_bytes.items(), key=lambda item: -item[1])
    ]
    print_table(ReportTable("bytes of each array", ["array", "bytes", "share"], arrays))
