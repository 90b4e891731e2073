"""Puts a report page together: from runs, results of suites, a store, and what a gallery showed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.checkpoints import find_checkpoint
from pipeline.report.gallery import Gallery, make_gallery
from pipeline.report.page import (
    TEACHER,
    Amount,
    Amounts,
    Curve,
    CurvePanel,
    Facts,
    GallerySample,
    Headline,
    Page,
    SuiteSection,
)
from pipeline.report.runs import RunView, held_out_headline, loss_panels, open_runs, settings_table, stage_table
from pipeline.report.suites import ModelResult, named_results, questions_about, suite_sections
from pipeline.report.targets import extraction_seconds, store_facts, target_sizes, teacher_name
from pipeline.sweep_file import Sweep, compared_data
from pipeline.ui.tables import ReportTable, size_text
from stages.checkpoints.weights import weights_digest
from stages.evaluation.attention.similarity import AttentionSimilarity
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.targets.summary import StoreSummary, summarize

NUM_PICTURES: Final = 8
_HEADLINE_SUITES: Final = 2


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of.

    Attributes:
        runs: folders of training runs or of sweeps.
        results: folders of `cdp evaluate`, of these runs or of others to compare with.
        teacher_results: the teacher's.
        samples, targets: for pictures and similarity; of these places alone without.
        teacher: its checkpoint, to show its attention from words.
        num_pictures: samples in the gallery at most.
    """

    runs: Sequence[Path]
    results: Sequence[Path] = ()
    teacher_results: Sequence[Path] = ()
    samples: str | None = None
    targets: str | None = None
    teacher: str | None = None
    num_pictures: int = NUM_PICTURES


def build_page(inputs: ReportInputs, title: str = "", progress: Progress = SILENT) -> Page:
    """The page of these inputs; parts of which nothing is known are left out.

    Raises:
        UserError: If a folder holds no run or no result, or the store and the students do not go together.
    """
    runs = open_runs(inputs.runs)
    results = named_results(inputs.results, inputs.teacher_results, _students(runs))
    similarity = {run.name: found for run in runs if (found := run.similarity()) is not None}
    gallery = Gallery((), (), {}, ())
    if inputs.samples is not None and inputs.targets is not None:
        finished = {run.name: str(run.folder.path) for run in runs if run.reports}
        gallery = make_gallery(
            finished,
            (inputs.samples, inputs.targets),
            inputs.num_pictures,
            teacher=inputs.teacher,
            measured=list(similarity),
            progress=progress,
        )
        similarity |= gallery.similarity
    page = unloaded_page(runs, results, similarity, inputs.targets or _targets_of(runs), inputs.teacher)
    return replace(
        page,
        title=title or page.title,
        samples=_with_questions(gallery, results),
        notes=(*page.notes, *gallery.notes),
    )


def unloaded_page(
    runs: Sequence[RunView],
    results: Sequence[ModelResult],
    similarity: Mapping[str, AttentionSimilarity],
    targets: str | None = None,
    teacher: str | None = None,
) -> Page:
    """All that is said without loading a model."""
    stored, notes = _summary(targets)
    names = [run.name for run in runs]
    models = dict.fromkeys([TEACHER, *names, *(one.model for one in results)])
    suites = suite_sections(results)
    return Page(
        title=f"Report: {', '.join(names)}",
        lead=_lead(runs, teacher, stored),
        models=tuple(models),
        headlines=_headlines(runs, suites, similarity, stored),
        suites=suites,
        similarity=_similarity_panel(similarity),
        losses=loss_panels(runs),
        amounts=_amounts(runs, stored),
        facts=_facts(runs, similarity, stored),
        notes=(*_unfinished(runs), *notes),
    )


def _unfinished(runs: Sequence[RunView]) -> list[str]:
    return [f"{run.name}: no stage is finished yet, so only its losses are shown" for run in runs if not run.reports]


def attention_page(
    models: Mapping[str, str],
    places: tuple[str, str],
    similarity: Mapping[str, AttentionSimilarity],
    tables: Sequence[ReportTable],
    num_pictures: int,
    *,
    teacher: str | None = None,
) -> Page:
    """The page of students alone, which need not be of runs: their attention, and the store.

    Args:
        models: name on the page to checkpoint or training run.
        places: sample shards and target store.
        similarity: as it was measured, by the same names.
        tables: what else was measured of them.
        num_pictures: samples in the gallery at most.
        teacher: its checkpoint, to show its attention from words.
    """
    gallery = make_gallery(models, places, num_pictures, teacher=teacher, measured=list(similarity))
    stored, notes = _summary(places[1])
    return Page(
        title=f"Attention of {', '.join(models)}",
        models=(TEACHER, *models),
        headlines=_headlines((), (), similarity, stored),
        samples=gallery.samples,
        similarity=_similarity_panel(similarity),
        amounts=_amounts((), stored),
        facts=(
            *(Facts(one.title, tuple(one.header), tuple(map(tuple, one.rows))) for one in tables),
            *_facts((), {}, stored),
        ),
        notes=(*notes, *gallery.notes),
    )


def sweep_page(sweep: Sweep, students: Iterable[str], progress: Progress = SILENT) -> Page:
    """The page of a sweep's finished students; pictures are of the data that they share."""
    runs = {name: sweep.runs[name] for name in students}
    places = {compared_data(run) for run in runs.values()}
    samples, targets = places.pop() if len(places) == 1 else (None, None)
    page = build_page(
        ReportInputs(
            runs=[Path(str(run.output)) for run in runs.values()],
            samples=samples,
            targets=targets,
            num_pictures=sweep.compare.pictures or NUM_PICTURES,
        ),
        f"Sweep {sweep.output.resolve().name}",
        progress,
    )
    apart = "the students were trained from different stores, so no pictures are shown"
    return page if samples is not None else replace(page, notes=(*page.notes, apart))


def _students(runs: Sequence[RunView]) -> dict[str, tuple[Path, str]]:
    return {
        run.name: (run.folder.path, weights_digest(find_checkpoint(str(run.folder.path))))
        for run in runs
        if run.reports
    }


def _targets_of(runs: Sequence[RunView]) -> str | None:
    """The store that all runs name; None where they name several, or none."""
    named = {run.run_file.targets for run in runs if run.run_file is not None}
    return named.pop() if len(named) == 1 else None


def _summary(targets: str | None) -> tuple[StoreSummary | None, list[str]]:
    if targets is None:
        return None, []
    try:
        return summarize(targets), []
    except UserError as error:
        return None, [f"nothing is said of the target store: {error}"]


def _with_questions(gallery: Gallery, results: Sequence[ModelResult]) -> tuple[GallerySample, ...]:
    asked = questions_about(gallery.images, results)
    return tuple(replace(sample, questions=found) for sample, found in zip(gallery.samples, asked, strict=True))


def _lead(runs: Sequence[RunView], teacher: str | None, stored: StoreSummary | None) -> str:
    count = "One student" if len(runs) == 1 else f"{len(runs)} students"
    name = teacher or (teacher_name(stored) if stored is not None else "")
    return f"{count} of {name}" if name else count


def _headlines(
    runs: Sequence[RunView],
    suites: Sequence[SuiteSection],
    similarity: Mapping[str, AttentionSimilarity],
    stored: StoreSummary | None,
) -> tuple[Headline, ...]:
    names, found = {run.name for run in runs}, []
    for suite in suites[:_HEADLINE_SUITES]:
        bars = {bar.model: bar for bar in suite.main.bars} if suite.main else {}
        if own := [bar for name, bar in bars.items() if name in names]:
            best = max(own, key=lambda bar: bar.value)
            teacher = f"; teacher {bars[TEACHER].value:.1f}" if TEACHER in bars else ""
            found.append(
                Headline(
                    suite.title,
                    f"{best.value:.1f}",
                    f"{best.model}, 95 % from {best.low:.1f} to {best.high:.1f}{teacher}",
                )
            )
    if similarity:
        name, closest = max(similarity.items(), key=lambda pair: pair[1].mean)
        found.append(Headline("attention similarity", f"{closest.mean:.3f}", f"{name}; 1 is the teacher's own"))
    if (lowest := held_out_headline(runs)) is not None:
        found.append(lowest)
    if stored is not None and stored.total_bytes:
        ratio = f"{stored.ratio:.1f} times smaller than raw, {stored.num_samples:,} samples"
        found.append(Headline("targets", size_text(stored.total_bytes), ratio))
    if seconds := sum(run.seconds for run in runs):
        found.append(Headline("training", _time_text(seconds), "all students together" if len(runs) > 1 else ""))
    return tuple(found)


def _similarity_panel(similarity: Mapping[str, AttentionSimilarity]) -> CurvePanel | None:
    curves = tuple(
        Curve(name, tuple(map(float, found.student_layers)), found.similarity) for name, found in similarity.items()
    )
    return CurvePanel("similarity", "student layer", curves) if curves else None


def _amounts(runs: Sequence[RunView], stored: StoreSummary | None) -> tuple[Amounts, ...]:
    found = [target_sizes(stored)] if stored is not None else []
    seconds = {f"training of {run.name}": run.seconds for run in runs if run.seconds}
    if stored is not None and (extraction := extraction_seconds(stored.url)) is not None:
        seconds = {"extraction, last command": extraction} | seconds
    if seconds:
        bars = (Amount(name, value, _time_text(value)) for name, value in seconds.items())
        found.append(Amounts("Time", tuple(bars)))
    return tuple(found)


def _facts(
    runs: Sequence[RunView], similarity: Mapping[str, AttentionSimilarity], stored: StoreSummary | None
) -> tuple[Facts, ...]:
    matched = [
        (name, str(layer), ", ".join(map(str, window)), f"{value:.3f}", f"{loss:.4f}")
        for name, found in similarity.items()
        for layer, window, value, loss in zip(
            found.student_layers, found.windows, found.similarity, found.alignment_loss, strict=True
        )
    ]
    header = ("student", "layer", "teacher layers", "similarity", "alignment loss")
    tables = (
        store_facts(stored) if stored is not None else None,
        stage_table(runs),
        Facts("Matched layers", header, tuple(matched)) if matched else None,
        settings_table(runs),
    )
    return tuple(table for table in tables if table is not None)


def _time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
