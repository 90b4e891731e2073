"""A sample on standard output: its tokens with the answers marked, its maps, what the teacher predicts."""

from collections.abc import Iterable, Sequence

from rich.columns import Columns
from rich.table import Table

from pipeline.ui.console import results
from stages.conversations.token_runs import TokenRun
from stages.inspection.map_picture import map_picture
from stages.inspection.stored_sample import Prediction, WindowMap
from storage.printable import printable

SHADES, ASCII_SHADES = " \N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}", " .:*#"
SHOWN_ROWS = 40
"""Answer tokens whose predictions are shown."""
_ANSWER_STYLE = "bold green"


def tokens_text(runs: Sequence[TokenRun]) -> str:
    """Gives the number of tokens, and of those of images and answers."""
    sizes = {part: sum(len(run.texts) for run in runs if run.part == part) for part in ("text", "image", "answer")}
    return f"{sum(sizes.values()):,}: {sizes['image']:,} of images, {sizes['answer']:,} of answers"


def print_tokens(runs: Iterable[TokenRun]) -> None:
    """Prints a line or more for each run: where it begins, what it is, its tokens with | between them.

    Answers have a colour where there are any, and are called so everywhere. Image tokens are counted.
    """
    table = Table.grid("from", "part", "tokens", padding=(0, 1))
    table.columns[0].justify = "right"
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for run in runs:
        tokens = f"|{'|'.join(map(printable, run.texts))}|"
        if run.part == "image":
            tokens = f"{len(run.texts):,} x {printable(run.texts[0])}"
        style = _ANSWER_STYLE if run.part == "answer" else ""
        table.add_row(str(run.start), "ANSWER" if run.part == "answer" else run.part, tokens, style=style)
    results.print(table)


def print_maps(windows: Sequence[WindowMap]) -> None:
    """Prints a picture of each window's map, and how much of what queries can see is taken for sinks."""
    try:
        SHADES.encode(results.encoding)
        shades = SHADES
    except UnicodeEncodeError:
        shades = ASCII_SHADES
    pictures = []
    for window in windows:
        layers = (
            f"layers {window.layers[0]} to {window.layers[-1]}" if window.layers[1:] else f"layer {window.layers[0]}"
        )
        lines = [
            layers,
            f"sinks {window.sink_share:.1%}",
            *(f"[{line}]" for line in map_picture(window.map_NN, shades)),
        ]
        pictures.append("\n".join(lines))
    results.print("attention maps: queries from top to bottom, keys from left to right, fuller is more")
    results.print(Columns(pictures, padding=(1, 2)))


def print_predictions(predictions: Sequence[Prediction]) -> None:
    """Prints a line for each answer token: its probability, and what the teacher takes for likeliest there."""
    table = Table("from", "answer token", "probability", "the teacher's likeliest tokens", title="answer tokens")
    for each in predictions[:SHOWN_ROWS]:
        likeliest = "  ".join(f"|{printable(text)}| {probability:.3f}" for text, probability in each.likeliest)
        probability = f"{each.probability:.3f}" if each.is_kept else f"< {each.probability:.1e}"
        table.add_row(str(each.position), f"|{printable(each.text)}|", probability, likeliest)
    results.print(table)
    if len(predictions) > SHOWN_ROWS:
        results.print(f"and {len(predictions) - SHOWN_ROWS:,} more")
