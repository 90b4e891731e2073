"""The HTML report of a comparison: tables and pictures in one file that needs nothing else."""

import base64
import io
from dataclasses import dataclass

from jinja2 import Environment
from PIL import Image

from pipeline.ui.tables import ReportTable

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 2rem }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.total td { font-weight: 600 }
.row { display: flex; gap: .8rem; flex-wrap: wrap; margin-bottom: 1.2rem }
figure { margin: 0; width: 192px } figcaption { font-size: 13px; color: #555 }
img { width: 192px; height: 192px; border-radius: 4px; image-rendering: pixelated }
p.text { margin: .2rem 0; color: #444 }
</style></head><body>
<h1>{{ title }}</h1>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<table><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr{% if row[0] == table.emphasized %} class="total"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endfor %}
{% if samples %}<h2>Visual attention</h2>
<p>Attention that each image token receives in the matched layers, mean over pairs, attention sinks left out.</p>
{% for sample in samples %}<p class="text">{{ sample.text }}</p><div class="row">
{% for name, picture in sample.pictures %}<figure><img src="data:image/png;base64,{{ picture }}" alt="{{ name }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</div>{% endfor %}{% endif %}
</body></html>
"""


@dataclass(frozen=True)
class ReportSample:
    """One sample's pictures side by side."""

    text: str
    pictures: list[tuple[str, Image.Image]]


def render_report(title: str, tables: list[ReportTable], samples: list[ReportSample]) -> str:
    """Renders the report as HTML, pictures embedded; all text is escaped."""
    encoded = [
        {"text": sample.text, "pictures": [(name, _png(picture)) for name, picture in sample.pictures]}
        for sample in samples
    ]
    return Environment(autoescape=True).from_string(_TEMPLATE).render(title=title, tables=tables, samples=encoded)


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
