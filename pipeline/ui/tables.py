"""Tables on standard output, and how they write sizes and counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from pipeline.ui.console import messages, results
from storage.printable import printable

OF_LOSSES = "losses are means over the last tenth of a stage's steps"
"""Said where a stage's report is shown; the lines of a running stage are about one step."""


@dataclass(frozen=True)
class ReportTable:
    """A table for the terminal and for an HTML report; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    emphasized: str = "average"
    """Name of the row that stands out, if there is one of that name."""


def print_table(content: ReportTable) -> None:
    """Prints the table; numbers stand at the right."""
    results.print(_table(content))


def print_table_above_bars(content: ReportTable) -> None:
    """Prints the table while progress is shown: where bars are on the terminal that it goes to, above them."""
    (messages if results.is_terminal and messages.is_interactive else results).print(_table(content))


def _table(content: ReportTable) -> Table:
    table = Table(title=printable(content.title))
    for number, name in enumerate(content.header):
        table.add_column(printable(name), justify="right" if number else "left", no_wrap=not number)
    for row in content.rows:
        table.add_row(*map(printable, row), style="bold" if row[0] == content.emphasized else None)
    return table


def markdown_table(content: ReportTable) -> str:
    """Gives the table in Markdown, its title above it."""
    lines = [content.header, ["---", *["---:"] * (len(content.header) - 1)], *content.rows]
    escaped = ([printable(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join([f"**{printable(content.title)}**", "", *(f"| {' | '.join(line)} |" for line in escaped)])


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Prints a table of what is told, and its value."""
    table = Table("", "", title=printable(title), show_header=False)
    for name, value in facts:
        table.add_row(printable(name), printable(value))
    results.print(table)


def print_notes(notes: Iterable[str]) -> None:
    """Prints a line for each note."""
    for note in notes:
        results.print(f"note: {printable(note)}")


def counts_text(counts: Mapping[str, int]) -> str:
    """Gives the sum of the counts, and each with its reason."""
    if not counts:
        return "none"
    return f"{sum(counts.values()):,} (" + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items()) + ")"


def cuts_text(num_samples: int, cut_samples: int, answer_tokens: int, cut_answer_tokens: int) -> str:
    """Gives how many of the samples lost answer tokens to `max_length`, and how many; `answer_tokens` were kept."""
    if not cut_samples:
        return "none"
    of_all = cut_answer_tokens / (answer_tokens + cut_answer_tokens)
    return (
        f"{cut_samples:,} ({cut_samples / num_samples:.1%}), which lost {cut_answer_tokens:,} answer tokens "
        f"({of_all:.1%} of all)"
    )


def size_text(num_bytes: float) -> str:
    """Gives bytes with a unit that keeps the number below 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
