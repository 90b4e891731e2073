"""Report pages with everything on them, drawn for tests."""

from dataclasses import replace

import numpy as np
from PIL import Image

from pipeline.report.page import (
    TEACHER,
    Amount,
    Amounts,
    AnsweredQuestion,
    Bar,
    BarGroup,
    Curve,
    CurvePanel,
    Facts,
    GallerySample,
    Headline,
    MapPanel,
    Page,
    SuiteSection,
)

HOSTILE = "</script><script>alert(1)</script><b>[bold]x[/bold]</b>\x1b[31m\u202eevil\u2066 & <!-- \u2028"
"""Script tags, markup of HTML and Rich, terminal escapes, bidirectional controls, a comment and a line separator."""
GRID = (6, 8)
NUM_LAYERS = 3


def gallery_sample(number: int, students: tuple[str, ...], text: str = "") -> GallerySample:
    """A picture with a bright square, and maps that differ by layer, model, sinks and word."""
    rows, columns = GRID
    generator = np.random.default_rng(number)
    image = Image.new("RGB", (columns * 40, rows * 40), (40 + 30 * number, 120, 160))
    image.paste((240, 210, 60), (40 * number, 40, 40 * number + 60, 100))
    words = tuple(f"word{place}{text}" for place in range(3))

    def maps(*shape: int) -> np.ndarray:
        return generator.random((*shape, rows * columns), dtype=np.float32) ** 6

    panels = tuple(
        MapPanel(
            name,
            tuple(f"layer {layer} for teacher layers {2 * layer} to {2 * layer + 1}" for layer in range(NUM_LAYERS)),
            maps(NUM_LAYERS),
            maps(NUM_LAYERS),
            None if name == TEACHER else maps(NUM_LAYERS, len(words)),
        )
        for name in (TEACHER, *students)
    )
    answers = tuple((name, f"a cube {text}", place % 2 == 0) for place, name in enumerate((TEACHER, *students)))
    asked = AnsweredQuestion(f"pope (generate) {text}", f"Is there a cube? {text}", f"yes {text}", answers)
    top, left = np.divmod(np.arange(rows * columns), columns)
    boxes = np.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows], 1).astype(np.float32)
    question, answer = f"What is left of the yellow square? {text}", f"A blue cube {number}. {text}"
    return GallerySample(f"{number:09d}{text}", question, answer, image, boxes, words, panels, (asked,))


def full_page(students: tuple[str, ...] = ("sft", "compodistill"), text: str = "", num_samples: int = 3) -> Page:
    """All sections; `text` is added wherever a page has text of others."""
    models = (TEACHER, *students)
    bars = tuple(Bar(name, 90.0 - 7 * n, 84.0 - 7 * n, 95.0 - 7 * n) for n, name in enumerate(models))
    group = BarGroup(f"average: accuracy {text}", bars, 50.0)
    steps = tuple(float(step) for step in range(10, 410, 10))

    def losses(term: str) -> CurvePanel:
        curves = [Curve(name, steps, tuple(2 + n / 4 - s / 400 for s in steps)) for n, name in enumerate(students)]
        held = [Curve(name, (200.0, 400.0), (2.1, 1.6), is_held_out=True) for name in students]
        return CurvePanel(f"dft: {term} {text}", "step", (*curves, *held))

    by_layer = tuple(Curve(name, (2.0, 3.0, 5.0), (0.4, 0.5 + n / 50, 0.6)) for n, name in enumerate(students))
    return Page(
        title=f"Report of {', '.join(students) or 'a store'} {text}",
        lead=f"Students of llava-1.5-7b {text}",
        models=models,
        headlines=(
            Headline(f"sugarcrepe {text}", "83.0 %", f"teacher 90.0 {text}"),
            Headline("attention similarity", "0.63", "1 is equal"),
            Headline("targets", "2.1 MB", "23.5 times smaller than raw"),
            Headline("training", "4 min", "2 students"),
        ),
        suites=(SuiteSection(f"sugarcrepe (likelihood) {text}", group, (group, group), (f"500 items {text}",)),),
        samples=tuple(gallery_sample(number, students, text) for number in range(num_samples)),
        similarity=CurvePanel(f"similarity by student layer {text}", "student layer", by_layer) if students else None,
        losses=tuple(map(losses, ("loss", "lm", "attention"))) if students else (),
        amounts=(
            Amounts(f"Targets {text}", (Amount(f"stored {text}", 2.1e6, "2.1 MB"), Amount("raw", 49e6, "49 MB"))),
        ),
        facts=(
            Facts(f"Store {text}", (), ((f"teacher {text}", f"llava {text}"), ("samples", "2,907"))),
            Facts("Settings", ("setting", *students), (("train.seed", *("1" for _ in students)),)),
        ),
        notes=(f"A note {text}",),
    )


def without_samples(page: Page) -> Page:
    """The page of a run whose store is not at hand."""
    return replace(page, samples=())
