"""The HTML report of a comparison: tables and pictures in one file that needs nothing else."""

import base64
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from pipeline.ui.tables import ReportTable
from storage.printable import printable

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class ReportSample:
    """One sample's pictures side by side."""

    text: str
    pictures: list[tuple[str, Image.Image]]


def render_report(title: str, tables: list[ReportTable], samples: list[ReportSample]) -> str:
    """Renders the report as HTML, pictures embedded; all text is escaped, and printable."""
    encoded = [
        {"text": sample.text, "pictures": [(name, _png(picture)) for name, picture in sample.pictures]}
        for sample in samples
    ]
    template = Environment(autoescape=True, finalize=partial(printable, keep="\n")).from_string(
        _TEMPLATE.read_text("utf-8")
    )
    return template.render(title=title, tables=tables, samples=encoded)


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
