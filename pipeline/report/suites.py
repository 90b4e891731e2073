"""Results of suites as bars, and what models answered about a picture."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.report.page import TEACHER, AnsweredQuestion, Bar, BarGroup, SuiteSection
from stages.evaluation.answered_items import AnsweredItem, read_items
from stages.evaluation.result import RESULT_FILE, SuiteResult, note_on_guessing, read_result
from stages.evaluation.result_folders import SUITES_FOLDER, result_names, results_below
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Answer

MOST_QUESTIONS: Final = 6
"""Items about one picture that are shown."""


@dataclass(frozen=True)
class ModelResult:
    """One suite's result of one model, by the model's name on the page."""

    model: str
    folder: Path
    result: SuiteResult


def named_results(
    folders: Iterable[Path], teacher_folders: Iterable[Path], runs: Mapping[str, tuple[Path, str]]
) -> list[ModelResult]:
    """All results, those of a run under its name, the teacher's as `teacher`, others by the folder around them.

    Args:
        folders: of results, also of models that are no run of the page, such as baselines.
        teacher_folders: of the teacher's results.
        runs: name of a run to its folder and the digest of its student's weights.
    """
    by_weights = {weights: name for name, (_, weights) in runs.items()}
    found = [_named(TEACHER, each) for path in teacher_folders for each in results_below(path)]
    found += [_named(name, each) for name, (run, _) in runs.items() for each in _of_run(run)]
    for path in folders:
        for each in results_below(path):
            weights = read_result(each).run.weights
            found.append(_named(by_weights.get(weights, result_names([each])[0]), each))
    # What was named twice, or lies in a run and was named too, is shown once.
    return list({(one.model, one.result.run.suite, one.result.run.protocol): one for one in found}.values())


def _of_run(run: Path) -> list[Path]:
    return results_below(run) if any(run.glob(f"{SUITES_FOLDER}/*/{RESULT_FILE}")) else []


def _named(model: str, folder: Path) -> ModelResult:
    result = read_result(folder)
    return ModelResult(f"{model} (grey pictures)" if result.run.blind else model, folder, result)


def suite_sections(results: Sequence[ModelResult]) -> tuple[SuiteSection, ...]:
    """A section for each suite, protocol and set of items, models side by side."""
    asked: dict[tuple[str, str, str], list[ModelResult]] = {}
    for one in results:
        run = one.result.run
        asked.setdefault((run.suite, run.protocol, run.items), []).append(one)
    sections = []
    for (suite, protocol, items), of_suite in asked.items():
        groups = _groups(of_suite)
        title = f"{suite} ({protocol})"
        if any(key[:2] == (suite, protocol) and key[2] != items for key in asked):
            title += f", items {items[:8]}"
        missing = max(one.result.num_missing for one in of_suite)
        notes = [f"{_num_asked(of_suite[0].result):,} items"]
        notes += [f"{missing:,} items without their pictures were not asked"] if missing else []
        notes += [note] if (note := note_on_guessing(of_suite[0].result)) else []
        sections.append(SuiteSection(title, groups.get(SUITES[suite].main), tuple(groups.values()), tuple(notes)))
    return tuple(sections)


def _num_asked(result: SuiteResult) -> int:
    """Items that were asked, each once, also where it counts for several kinds; older versions say those of kinds."""
    if result.run.num_items is None:
        return sum(result.num_items.values())
    return result.run.num_items - result.num_missing


def _groups(results: Sequence[ModelResult]) -> dict[tuple[str, str], BarGroup]:
    bars: dict[tuple[str, str], list[Bar]] = {}
    chances: dict[tuple[str, str], float | None] = {}
    for one in results:
        for kind, of_kind in one.result.metrics.items():
            for name, metric in of_kind.items():
                bars.setdefault((kind, name), []).append(Bar(one.model, metric.value, *metric.interval_95))
                chances[kind, name] = metric.chance
    return {key: BarGroup(f"{key[0]}: {key[1]}", tuple(each), chances[key]) for key, each in bars.items()}


def questions_about(images: Sequence[bytes], results: Sequence[ModelResult]) -> list[tuple[AnsweredQuestion, ...]]:
    """For each picture, the items of suites that show the same file, and what the models answered."""
    rows = {hashlib.sha256(image).hexdigest(): row for row, image in enumerate(images)}
    found: list[dict[tuple[str, str], AnsweredQuestion]] = [{} for _ in images]
    for one in results:
        for item in read_items(one.folder).values():
            shown = {digest for question in item.questions for digest in question.pictures}
            for row in {rows[digest] for digest in shown & rows.keys()}:
                _add(found[row], one, item)
    return [tuple(each.values())[:MOST_QUESTIONS] for each in found]


def _add(found: dict[tuple[str, str], AnsweredQuestion], one: ModelResult, item: AnsweredItem) -> None:
    run = one.result.run
    key = (f"{run.suite} ({run.protocol})", item.id)
    said = " / ".join(
        _answer_text(answer, question.candidates) for answer, question in zip(item.answers, item.questions, strict=True)
    )
    before = found.get(key)
    found[key] = AnsweredQuestion(
        suite=key[0],
        question=" / ".join(dict.fromkeys(question.prompt for question in item.questions)),
        expected=_expected_text(item.expected),
        answers=(*(before.answers if before else ()), (one.model, said, _is_right(item.scored.counts))),
    )


def _answer_text(answer: Answer, candidates: Sequence[str]) -> str:
    if isinstance(answer, str):
        return answer
    best = max(range(len(answer)), key=lambda number: answer[number].total)
    return candidates[best] if best < len(candidates) else ""


def _expected_text(expected: Any) -> str:
    if isinstance(expected, list | tuple):
        return ", ".join(map(str, expected))
    return "" if expected is None else str(expected)


def _is_right(counts: Mapping[str, float]) -> bool | None:
    """Of an item that counts one thing, and that wholly or not at all."""
    values = [counts["accuracy"]] if "accuracy" in counts else list(counts.values())
    return bool(values[0]) if len(values) == 1 and values[0] in (0, 1) else None
