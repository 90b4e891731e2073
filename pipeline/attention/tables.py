"""Tables of `cdp compare-attention`: how alike attention is, what it falls on, and where answers are right."""

from collections.abc import Sequence

from pipeline.attention.report import AttentionReport, StudentAttention
from pipeline.ui.tables import ReportTable
from stages.evaluation.attention.measures import Estimate
from stages.evaluation.attention.tally import LayerMeasures

_COLUMNS = {
    "between_images": "differ between images",
    "objects": "AUC of objects",
    "text_objects": "AUC from {text}",
    "text_share": "{text}: share on image",
    "text_similarity": "{text}: like the teacher's",
}


def attention_tables(report: AttentionReport) -> list[ReportTable]:
    """A table of similarities, one of what attention falls on, and one of answers; those that have something."""
    tables = []
    if report.students:
        tables += [_similarities(name, student, report) for name, student in report.students.items()]
    tables.append(_measures(report))
    if any(student.answers for student in report.students.values()):
        tables.append(_answers(report))
    return tables


def estimate_text(estimate: Estimate | None, digits: int = 3) -> str:
    """Gives the number with its interval."""
    if estimate is None:
        return ""
    if estimate.interval_95 is None:
        return f"{estimate.value:.{digits}f}"
    low, high = estimate.interval_95
    return f"{estimate.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _similarities(name: str, student: StudentAttention, report: AttentionReport) -> ReportTable:
    found = student.similarity
    pairs = zip(found.student_layers, found.windows, student.intervals, found.alignment_loss, strict=True)
    rows = [
        [str(layer), ", ".join(map(str, window)), estimate_text(estimate), f"{loss:.4f}"]
        for layer, window, estimate, loss in pairs
    ]
    which = "layers as trained" if found.layers_from == "training" else "layers matched by default"
    about = f"{found.num_samples} samples about {report.num_images} images"
    return ReportTable(
        f"attention similarity over {about}, 95 % intervals: {name}, {which}",
        ["student layer", "teacher layers", "similarity", "alignment loss"],
        [*rows, ["average", "", estimate_text(student.mean), ""]],
    )


def _measures(report: AttentionReport) -> ReportTable:
    models = [("teacher", report.teacher), *((name, student.measures) for name, student in report.students.items())]
    names = [name for name in _COLUMNS if any(getattr(measures, name) for _, measures in models)]
    rows = [row for name, measures in models for row in _rows(name, measures, names)]
    live = "run on them" if report.teacher_is_live else "stored maps"
    about = f"{report.num_samples} samples about {report.num_images} images, the teacher's {live}"
    if report.num_without_image:
        about = f"{about}; {report.num_without_image} without an image left out"
    if report.num_with_text:
        about = f"{about}; {report.text!r} in {report.num_with_text} samples about {report.num_images_with_text} images"
    if report.num_object_pictures:
        about = f"{about}; objects known in {report.num_with_objects} samples"
    header = ["model", "layer", *(_COLUMNS[name].format(text=report.text) for name in names)]
    return ReportTable(f"what attention falls on: {about}; AUC .5 is chance, 95 % intervals", header, rows)


def _rows(model: str, measures: LayerMeasures, names: Sequence[str]) -> list[list[str]]:
    rows = []
    for number, layers in enumerate(measures.layers):
        values = [getattr(measures, name) for name in names]
        cells = [estimate_text(column[number]) if column else "" for column in values]
        rows.append([model, ", ".join(map(str, layers)), *cells])
    return rows


def _answers(report: AttentionReport) -> ReportTable:
    rows = [
        [
            name,
            split.suite,
            split.protocol,
            str(split.num_items),
            str(split.num_without_sample),
            estimate_text(split.right),
            estimate_text(split.wrong),
            estimate_text(split.correlation),
        ]
        for name, student in report.students.items()
        for split in student.answers
    ]
    header = [
        "student",
        "suite",
        "protocol",
        "items",
        "no sample",
        "similarity where right",
        "where wrong",
        "correlation",
    ]
    return ReportTable("similarity where answers are right; intervals over images", header, rows)
