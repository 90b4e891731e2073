"""`cdp inspect`."""

from typing import Annotated

import typer

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
    "cut",
    "images",
]
"""Fields of the fingerprint."""


def inspect(
    targets: TargetsArgument,
    sample: Annotated[
        str | None, typer.Option("--sample", help="Shows one sample: a key, or a number from 0 among all samples.")
    ] = None,
) -> None:
    """Shows what a target store holds. Counts shards, samples, maps and bytes of each array; names the teacher.

    With --sample: its tokens, its attention maps and what the teacher predicts.
    """
    from pipeline.preflight import check_targets

    check_targets(targets)
    if sample is None:
        _print_store(targets)
    else:
        _print_sample(targets, sample)


def _print_sample(targets: str, name: str) -> None:
    from pipeline.ui.sample_view import print_maps, print_predictions, print_tokens, tokens_text
    from pipeline.ui.tables import print_facts
    from stages.inspection.stored_sample import view_sample
    from storage.targets.store import TargetStore

    store = TargetStore.open(targets)
    view = view_sample(store, name)
    cut = f"{view.num_cut_answer_tokens:,} answer tokens lost to max_length" if view.num_cut_answer_tokens else "no"
    facts = [
        ("place", f"row {view.row} of shard {view.shard}"),
        ("tokens", tokens_text(view.runs)),
        ("cut", cut),
        ("maps", f"of {len(view.windows[0].map_NN):,} image tokens" if view.windows else "none"),
    ]
    print_facts(f"sample {view.key} of {store.store.url}", facts)
    print_tokens(view.runs)
    if view.windows:
        print_maps(view.windows)
    print_predictions(view.predictions)


def _print_store(targets: str) -> None:
    from pipeline.ui.tables import ReportTable, counts_text, cuts_text, print_facts, print_table, size_text
    from storage.targets.summary import summarize

    summary = summarize(targets)
    of_answers = summary.array_bytes.get("answer_attention", 0)
    answers = f"{size_text(of_answers)}, {of_answers / summary.total_bytes:.1%} of all" if of_answers else "none"
    facts = [
        ("shards", f"{summary.num_committed:,} of {summary.num_planned:,}"),
        ("samples", f"{summary.num_samples:,}"),
        ("skipped", counts_text(summary.skipped_by_reason)),
        (
            "cut at max_length",
            cuts_text(
                summary.num_samples, summary.num_cut_samples, summary.num_answer_rows, summary.num_cut_answer_tokens
            ),
        ),
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
        ("answer attention", answers),
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
