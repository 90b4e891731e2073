"""The HTML report of a comparison."""

from PIL import Image

from pipeline.ui.html_report import ReportSample, render_report
from pipeline.ui.tables import ReportTable


def test_pages_escape_text_and_hold_their_pictures() -> None:
    html = render_report(
        "a & b",
        [ReportTable("t", ["kind", "m"], [["<script>", "1.0"]])],
        [ReportSample("what <b>?", [("image", Image.new("RGB", (4, 4)))])],
    )
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "data:image/png;base64," in html
