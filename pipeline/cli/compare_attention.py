"""`cdp compare-attention`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    ReportOption,
    SamplesOption,
    TargetsOption,
    can_be_saved,
    check_and_say_which,
    save,
)

if TYPE_CHECKING:
    from pipeline.ui.tables import ReportTable
    from stages.evaluation.attention.similarity import AttentionSimilarity

NUM_PICTURES = 8


def compare_attention(
    model: Annotated[str, typer.Argument(help="Student checkpoint or training run.")],
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    limit: Annotated[int, typer.Option(help="Samples to compare on.", min=1)] = 64,
    report: ReportOption = None,
    html: Annotated[
        Path | None, typer.Option(callback=can_be_saved, help="File to save an HTML report with pictures in.")
    ] = None,
) -> None:
    """Compares a student's attention with the teacher's. Gives numbers and pictures, from the stored maps."""
    from pipeline.preflight import check_pairing
    from pipeline.run_file import need

    samples, targets = need(samples, "--samples"), need(targets, "--targets")
    check_and_say_which(model, with_template=False)
    check_pairing(samples, targets)

    from pipeline.attention_comparison import compare_with_targets
    from pipeline.ui.progress import progress_display
    from pipeline.ui.tables import print_table

    with progress_display() as progress:
        result = compare_with_targets(model, samples, targets, limit, progress)
    print_table(similarity_table(result))
    save(report, result.to_json())
    if html is not None:
        from pipeline.report.build import attention_page
        from pipeline.ui.report.render import render_page

        name = Path(model).name
        save(html, render_page(attention_page({name: model}, (samples, targets), {name: result}, NUM_PICTURES)))


def similarity_table(result: "AttentionSimilarity") -> "ReportTable":
    """Makes a line for each matched pair of layers, and their mean."""
    from pipeline.ui.tables import ReportTable

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
