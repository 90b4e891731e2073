"""What training runs left behind: their stages, losses by step, settings, and attention similarity where measured."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from pipeline.checkpoints import find_runs
from pipeline.report.page import Curve, CurvePanel, Facts, Headline
from pipeline.report.shown_names import shown_names
from pipeline.run_file import RunFile, load_run_file
from stages.evaluation.attention.similarity import AttentionSimilarity
from stages.settings import flattened
from stages.student.run_folder import RunFolder, StageReport
from stages.student.stage_config import STAGES, StageName
from storage.digests import parse_object
from storage.regular_files import open_regular, read_regular

METRICS_FILE: Final = "metrics.jsonl"
COMPARED_FILE: Final = "compared.json"
TERMS: Final = ("loss", "lm", "kd", "attention", "answer_attention")
HELD_OUT: Final = "validation/"
MOST_POINTS: Final = 120
"""Points of a curve on the page; of more steps, means of neighbouring ones are shown."""
_PLACES: Final = ("student", "samples", "targets")
"""Settings beside those of `train` that say what a run is of."""


@dataclass(frozen=True)
class RunView:
    """One training run, by the name it has on the page."""

    name: str
    folder: RunFolder

    @cached_property
    def reports(self) -> dict[StageName, StageReport]:
        """Reports of the finished stages."""
        return {name: self.folder.stage(name).report() for name in self.folder.finished()}

    @property
    def seconds(self) -> float:
        """Training time of all finished stages."""
        return sum(report.seconds for report in self.reports.values())

    @cached_property
    def run_file(self) -> RunFile | None:
        """Settings of the last command that trained here; None where they were not saved."""
        return load_run_file(self.folder.run_file, [], {}) if self.folder.run_file.is_file() else None

    def similarity(self) -> AttentionSimilarity | None:
        """As a sweep measured it; None for other runs, and for a measure of another version."""
        path = self.folder.path / COMPARED_FILE
        if not path.is_file():
            return None
        found = parse_object(read_regular(path), str(path), "remove the file; the sweep then measures again")
        try:
            similarity = AttentionSimilarity.model_validate(found.get("similarity"))
        except ValidationError:
            return None
        by_pair = similarity.student_layers, similarity.windows, similarity.similarity, similarity.alignment_loss
        return similarity if by_pair[0] and len(set(map(len, by_pair))) == 1 else None


def open_runs(paths: Iterable[Path]) -> list[RunView]:
    """The runs at these places, in order; those of a sweep's folder each by itself.

    Raises:
        UserError: If a place holds none.
    """
    found = list(dict.fromkeys(one for path in paths for one in find_runs(path)))
    return [RunView(name, RunFolder(path)) for name, path in zip(shown_names(found), found, strict=True)]


def loss_panels(runs: Sequence[RunView]) -> tuple[CurvePanel, ...]:
    """A chart for each stage and term that was logged, of training and held-out samples, all runs in it."""
    panels = []
    for stage in STAGES:
        logged = {run.name: list(_logged(run.folder.stage(stage).path / METRICS_FILE)) for run in runs}
        for term in TERMS:
            curves = [
                curve
                for name, lines in logged.items()
                for prefix in ("", HELD_OUT)
                if (curve := _curve(name, lines, prefix, term)) is not None
            ]
            if curves and not (term == "loss" and _is_lm(logged)):
                panels.append(CurvePanel(f"{stage}: {term}", "step", tuple(curves)))
    return tuple(panels)


def _is_lm(logged: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether every run learned from the answers alone: then the loss is its one term."""
    return not any(term in line for lines in logged.values() for line in lines for term in TERMS[2:])


def _logged(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open_regular(path) as file:
        # The last line may have been cut by a kill.
        for number, line in enumerate(file, 1):
            if line.endswith(b"}\n"):
                yield parse_object(line, f"{path}, line {number}", "remove the line")


def _curve(name: str, lines: list[dict[str, Any]], prefix: str, term: str) -> Curve | None:
    points = [(float(line["step"]), float(line[prefix + term])) for line in lines if _has(line, prefix + term)]
    if not points:
        return None
    x, y = (thinned(values, MOST_POINTS) for values in zip(*points, strict=True))
    return Curve(name, x, y, is_held_out=bool(prefix))


def _has(line: dict[str, Any], name: str) -> bool:
    return all(isinstance(line.get(one), int | float) for one in ("step", name))


def thinned(values: Sequence[float], most: int) -> tuple[float, ...]:
    """The values, or where there are more than `most`, means of that many neighbouring groups."""
    if len(values) <= most:
        return tuple(values)
    edges = [round(number * len(values) / most) for number in range(most + 1)]
    return tuple(sum(values[a:b]) / (b - a) for a, b in pairwise(edges))


def settings_table(runs: Sequence[RunView]) -> Facts | None:
    """What the runs were given other than the defaults, a column a run; None where no settings were saved."""
    by_run = {run.name: _changed(run.run_file) for run in runs if run.run_file is not None}
    if not by_run:
        return None
    default = flattened(RunFile().model_dump(mode="json"))
    names = dict.fromkeys(name for changed in by_run.values() for name in changed)
    rows = []
    for name in names:
        own = [_text(changed.get(name, default.get(name))) for changed in by_run.values()]
        rows.append((name, _text(default.get(name)), *own))
    # What differs between the runs is looked for first.
    rows.sort(key=lambda row: len(set(row[2:])) == 1)
    title = "Settings that differ from the defaults" + (", those between runs first" if len(by_run) > 1 else "")
    return Facts(title, ("setting", "default", *by_run), tuple(rows))


def _changed(run: RunFile) -> dict[str, Any]:
    default = flattened(RunFile().model_dump(mode="json"))
    return {
        name: value
        for name, value in flattened(run.model_dump(mode="json")).items()
        if (name in _PLACES or name.startswith("train.")) and value != default.get(name)
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def stage_table(runs: Sequence[RunView]) -> Facts | None:
    """A line for each finished stage; None where none is finished."""
    is_held_out = any(report.validation is not None for run in runs for report in run.reports.values())
    rows = [
        (
            f"{run.name}: {report.stage}",
            f"{report.steps:,}",
            f"{report.samples:,}",
            f"{report.trained_parameters:,}",
            f"{report.seconds:,.0f}",
            f"{report.samples_per_s:,.1f}",
            f"{report.losses.get('loss', math.nan):.4f}",
            *([_held_out(report)] if is_held_out else []),
        )
        for run in runs
        for report in run.reports.values()
    ]
    shown = ("held-out loss",) if is_held_out else ()
    header = ("stage", "steps", "samples", "trained", "seconds", "samples/s", "loss at the end", *shown)
    return Facts("Stages; losses are means over the last tenth of the steps", header, tuple(rows)) if rows else None


def _held_out(report: StageReport) -> str:
    return "" if report.validation is None else f"{report.validation.losses.get('loss', math.nan):.4f}"


def held_out_headline(runs: Sequence[RunView]) -> Headline | None:
    """The lowest LM loss on held-out samples; sums of losses compare only where terms and weights are the same.

    None where a run that held out samples has no such loss, or no run held out any.
    """
    losses = {
        run.name: last.validation.losses
        for run in runs
        if run.reports and (last := list(run.reports.values())[-1]).validation is not None
    }
    if not losses or not all("lm" in found for found in losses.values()):
        return None
    name = min(losses, key=lambda each: losses[each]["lm"])
    return Headline("held-out lm", f"{losses[name]['lm']:.3f}", f"{name}, at the end of training")
