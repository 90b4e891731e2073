"""Tables on standard output, and how they write sizes and counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from pipeline.ui.console import results


@dataclass(frozen=True)
class ReportTable:
    """A table for the terminal and for an HTML report; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


def print_report_table(content: ReportTable) -> None:
    """Prints the table; its row "average" stands out."""
    table = Table(title=escape(content.title))
    for number, name in enumerate(content.header):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=not number)
    for row in content.rows:
        table.add_row(*map(escape, row), style="bold" if row[0] == "average" else None)
    results.print(table)


def facts_table(subject: str, location: str) -> Table:
    """An empty table of two columns: what is told of a subject, and its value."""
    table = Table(title=f"{subject}: {escape(location)}", show_header=False)
    table.add_column()
    table.add_column()
    return table


def print_notes(notes: Iterable[str]) -> None:
    """A line for each note."""
    for note in notes:
        results.print(f"note: {escape(note)}")


def counts_text(counts: Mapping[str, int]) -> str:
    """The sum of the counts, and each with its reason."""
    if not counts:
        return "none"
    return f"{sum(counts.values()):,} (" + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items()) + ")"


def size_text(num_bytes: float) -> str:
    """Bytes with a unit that keeps the number below 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
