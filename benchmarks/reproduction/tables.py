"""Tables of docs/reproduction.md, from the records; each stands in the page behind a comment with its name."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

PAGE = Path("docs/reproduction.md")
MEASURES = {
    "colour": "colour, of two words",
    "end_named": "end",
    "middle_named": "middle",
    "area_end_named": "area under `end`",
    "steps_end_named": "steps to .75 on `end`",
    "processor_s_per_step": "ms a step",
}
CLAIMS = (
    ("logits and attention", "logits, own projector"),
    ("all", "logits"),
    ("rows", "logits and attention"),
    ("all, rows", "all"),
    ("answers", "logits, own projector"),
    ("all, published mask", "logits"),
)
"""The primary difference of PROTOCOL.md, then the secondary ones."""
DIFFERENCES = ("area_end_named", "end_named", "middle_named", "colour", "steps_end_named")


def record(step: str) -> dict[str, Any]:
    """What a step of the reproduction found."""
    found: dict[str, Any] = json.loads((RESULTS / f"reproduction_{step}.json").read_text())
    return found


def checks() -> str:
    """What holds of the world."""
    probe, teacher, look = record("world")["probe"], record("teacher"), record("attention")["auc_of_layer"]
    reached, apart = teacher["reached"], teacher["image_tokens_apart"]
    rows = [["probe of an object's own token: shape, colour", _two(probe["shape_own"], probe["colour_own"])]]
    rows += [["probe of the token beside it (chance .125)", _two(probe["shape_beside"], probe["colour_beside"])]]
    kinds = ("colour", "end", "middle")
    rows += [["teacher: colour, end, middle", ", ".join(_share(reached[kind]) for kind in kinds)]]
    rows += [["the same with image tokens kept apart", ", ".join(_share(apart[kind]) for kind in kinds)]]
    for layer, found in look.items():
        rows.append([f"AUC of object against background, layer {layer}, every entry", _share(found["all"])])
        rows.append([f"the same, published mask; another picture's map, layer {layer}",
                     _two(found["sink_free"], found["other_picture"])])  # fmt: skip
    return _table(["check, on the validation pictures", "found"], rows)


def arms(step: str) -> str:
    """Means over seeds, 95 % intervals in brackets."""
    summary = record(step)["summary"]["arms"]
    rows = [
        [arm, *(_estimate(found[measure], _form(measure)) for measure in MEASURES)] for arm, found in summary.items()
    ]
    return _table(["arm", *MEASURES.values()], rows)


def claims() -> str:
    """The differences that the protocol names."""
    differences = record("compare")["summary"]["differences"]
    rows = []
    for arm, reference in CLAIMS:
        found = differences[f"{arm} - {reference}"]
        rows.append(
            [f"{arm} - {reference}", *(_estimate(found[measure], _form(measure, "+")) for measure in DIFFERENCES)]
        )
    return _table(["difference", *(MEASURES[measure] for measure in DIFFERENCES if measure in MEASURES)], rows)


def oracle() -> str:
    """Students guided by construction, seed by seed."""
    rows = []
    for arm, runs in record("oracle")["arms"].items():
        for seed, run in runs.items():
            steps = run["steps_to_level"]["end"]
            reached = [_share(run["reached"][kind]) for kind in ("colour", "end", "middle")]
            rows.append([arm, seed, f"{steps:.0f}" if steps else "not by the end", *reached])
    return _table(["student", "", "`end` to .75 at step", "colour", "end", "middle"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "checks": checks,
    "oracle": oracle,
    "compare": lambda: arms("compare"),
    "claims": claims,
    "explore": lambda: arms("explore"),
}


def with_tables(page: str) -> str:
    """The page with each table as the records have it."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n\n)(?:\|.*\n)*")
        if len(found := place.findall(page)) != 1:
            raise ValueError(f"the page has {len(found)} places for the table {name}, expected one")
        # As a function, so that no backslash of a cell is read as a reference.
        page = place.sub(partial(_behind, table()), page)
    return page


def _behind(table: str, place: re.Match[str]) -> str:
    return f"{place[1]}{table}\n"


def _form(measure: str, sign: str = "") -> Callable[[float], str]:
    if measure.startswith("steps"):
        return lambda value: f"{value:{sign}.0f}"
    if measure == "processor_s_per_step":
        return lambda value: f"{value * 1000:{sign}.0f}"
    return lambda value: f"{value:{sign}.3f}"


def _estimate(found: Mapping[str, Any], form: Callable[[float], str]) -> str:
    if found["interval_95"] is None:
        return form(found["mean"])
    low, high = found["interval_95"]
    return f"{form(found['mean'])} ({form(low)} to {form(high)})"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _two(first: float, second: float) -> str:
    return f"{_share(first)}, {_share(second)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
