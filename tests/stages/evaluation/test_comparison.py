"""Results side by side: differences on the same items, and what cannot be compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.evaluation.comparison import SuiteComparison, compare_results, mcnemar
from stages.evaluation.result import item_line, make_result, read_items
from stages.evaluation.suites.suite import Item
from storage.errors import UserError
from tests.suite_runs import suite_run


def save_result(folder: Path, right: Sequence[float], *, num_images: int | None = None, **run: Any) -> Path:
    """A result of SugarCrepe with one kind; `right` says what each pair counts, about images in turn."""
    folder.mkdir(parents=True)
    units = [str(number % (num_images or len(right))) for number in range(len(right))]
    items = [Item(f"swap_obj/{number}", ("swap_obj",), (), None, unit) for number, unit in enumerate(units)]
    lines = [item_line(item, [], {"accuracy": value}, {}) for item, value in zip(items, right, strict=True)]
    (folder / "items.jsonl").write_text("".join(f"{line}\n" for line in lines))
    result = make_result(suite_run(model=str(folder), **run), read_items(folder).values(), [], 200, 1.0, len(right))
    (folder / "result.json").write_text(result.to_json())
    return folder


def compare(tmp_path: Path, first: Sequence[float], second: Sequence[float], **run: Any) -> SuiteComparison:
    return compare_results({"a": save_result(tmp_path / "a", first), "b": save_result(tmp_path / "b", second, **run)})


def test_a_difference_is_tested_on_the_items_that_changed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 2, 200).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:12]] = 1
    second[np.flatnonzero(first == 1)[:2]] = 0
    metric = compare(tmp_path, first.tolist(), second.tolist()).metrics["swap_obj"]["accuracy"]
    found = metric.differences["b"]
    assert found.value == pytest.approx(5)
    assert found.test == "mcnemar"
    # Twice the binomial tail: (1 + 14 + 91) / 2**14.
    assert found.p_value == pytest.approx(2 * 106 / 2**14)
    spread = 1.96 * 100 * np.std(second - first) / np.sqrt(200)
    assert found.interval_95 == pytest.approx((5 - spread, 5 + spread), abs=0.4)
    assert metric.values["b"].value - metric.values["a"].value == pytest.approx(5)


def test_the_paired_interval_is_narrower_than_that_of_either_result(tmp_path: Path) -> None:
    first = [1.0, 0.0] * 100
    second = [1.0, 1.0, *first[2:]]
    found = compare(tmp_path, first, second).metrics["swap_obj"]["accuracy"]
    low, high = found.differences["b"].interval_95
    assert high - low < 3 < found.values["a"].interval_95[1] - found.values["a"].interval_95[0]


def test_items_that_share_images_are_tested_by_bootstrap_over_images(tmp_path: Path) -> None:
    first = save_result(tmp_path / "a", [1.0, 0.0] * 20, num_images=4)
    second = save_result(tmp_path / "b", [1.0, 1.0] * 20, num_images=4)
    found = compare_results({"a": first, "b": second}).metrics["swap_obj"]["accuracy"].differences["b"]
    assert found.test == "bootstrap"


def test_shares_of_items_are_tested_by_bootstrap(tmp_path: Path) -> None:
    found = compare(tmp_path, [0.5] * 40, [0.5, 1.0] * 20).metrics["swap_obj"]["accuracy"].differences["b"]
    assert (found.test, found.p_value) == ("bootstrap", 2 / 2001)


def test_equal_results_do_not_differ(tmp_path: Path) -> None:
    found = compare(tmp_path, [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]).metrics["average"]["accuracy"].differences["b"]
    assert (found.value, found.interval_95, found.p_value) == (0, (0, 0), 1)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [(0, 0, 1.0), (1, 1, 1.0), (5, 0, 2 / 32), (8, 1, 20 / 512), (6000, 6200, 0.0715943516)],
)
def test_mcnemars_p_value_is_that_of_a_fair_coin(gained: int, lost: int, p_value: float) -> None:
    before = [0.0] * gained + [1.0] * lost + [1.0, 0.0]
    after = [1.0] * gained + [0.0] * lost + [1.0, 0.0]
    assert mcnemar(before, after) == pytest.approx(p_value, rel=1e-3)


@pytest.mark.parametrize(("what", "value"), [("items", "e"), ("protocol", "compodistill"), ("suite", "pope")])
def test_results_of_other_data_or_another_protocol_are_refused(what: str, value: str, tmp_path: Path) -> None:
    first, second = save_result(tmp_path / "a", [1.0, 0.0]), save_result(tmp_path / "b", [1.0, 0.0])
    saved = json.loads((second / "result.json").read_text())
    saved["run"][what] = value
    (second / "result.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"b cannot be compared with a: its {what} is {value}"):
        compare_results({"a": first, "b": second})


def test_results_with_other_answered_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 items of b were answered, 2 of a"):
        compare(tmp_path, [1.0, 0.0], [1.0])


def test_a_result_with_grey_pictures_is_the_control_of_one_with_its_own(tmp_path: Path) -> None:
    found = compare(tmp_path, [1.0, 0.0], [0.0, 0.0], blind=True)
    assert [run.blind for run in found.results.values()] == [False, True]
