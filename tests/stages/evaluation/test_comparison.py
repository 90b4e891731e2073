"""Results side by side: differences on the same items, and what cannot be compared."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.evaluation.answered_items import item_line, read_items
from stages.evaluation.comparison import SuiteComparison, compare_results, mcnemar
from stages.evaluation.result import make_result
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Item, Question
from storage.errors import UserError
from tests.suite_runs import suite_run


def save_result(folder: Path, right: Sequence[float], *, num_images: int | None = None, **run: Any) -> Path:
    """A result of SugarCrepe with one kind; `right` says what each pair counts, about images in turn."""
    folder.mkdir(parents=True)
    units = [str(number % (num_images or len(right))) for number in range(len(right))]
    items = [Item(f"swap_obj/{number}", ("swap_obj",), (), None, unit) for number, unit in enumerate(units)]
    lines = [item_line(item, [], {"accuracy": value}, ()) for item, value in zip(items, right, strict=True)]
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
    assert (found.test, found.num_units, found.units) == ("bootstrap", 4, "images")


def test_runs_that_were_shown_other_pictures_of_the_same_names_are_not_compared(tmp_path: Path) -> None:
    folders = {name: save_result(tmp_path / name, [1.0, 0.0, 1.0]) for name in ("a", "b")}
    for name, digest in (("a", "11"), ("b", "22")):
        file = folders[name] / "items.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[1]["questions"] = [{"prompt": "", "pictures": ["dog.jpg"], "sha256": [digest]}]
        lines[1]["answers"] = ["A"]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=r"^b cannot be compared with a: 1 items .*other pictures.* as swap_obj/1;"):
        compare_results(folders)


@pytest.mark.parametrize(("num_images", "test"), [(6, "mcnemar"), (3, "bootstrap")])
@pytest.mark.parametrize(("suite", "metric"), [("pope", "accuracy"), ("reefknot", "hallucination_rate")])
def test_answers_of_yes_and_no_are_right_or_wrong_items(
    suite: str, metric: str, num_images: int, test: str, tmp_path: Path
) -> None:
    folders = {}
    for name, said in (("a", [True, True, True, False, False, False]), ("b", [True, False] * 3)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        lines = []
        for number, yes in enumerate(said):
            is_yes = number % 2 == 0
            item = Item(
                f"yesno/{number}", ("yesno",), (Question("?", ()),), "yes" if is_yes else "no", str(number % num_images)
            )
            counts = SUITES[suite].count(item, ["yes" if yes else "no"], "generate")
            lines.append(item_line(item, ["yes" if yes else "no"], counts, [[]]) + "\n")
        (folders[name] / "items.jsonl").write_text("".join(lines))
        run = suite_run(suite=suite, protocol="generate")
        result = make_result(run, read_items(folders[name]).values(), [], 200, 1.0, 6)
        (folders[name] / "result.json").write_text(result.to_json())
    found = compare_results(folders).metrics["yesno"]
    assert found[metric].differences["b"].test == test
    assert found["f1"].differences["b"].test == "bootstrap"
    if test == "mcnemar":
        # Two more are right than before, and none less.
        assert found[metric].differences["b"].p_value == 2 * 0.5**2


def test_a_mean_over_sources_is_no_share_of_items(tmp_path: Path) -> None:
    """Of one source both items are right, of another one none of two, and one item of one: pooled it is 3 of 5."""
    folders = {}
    for name in ("a", "b"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        right = {"x": [1.0, 1.0], "y": [0.0, 0.0], "z": [1.0]}
        items = [
            (Item(f"{source}/{number}", (f"Relation/{source}", "Relation"), (), None), value)
            for source, values in right.items()
            for number, value in enumerate(values)
        ]
        lines = [item_line(item, [], {"recall_at_1": value, "chance": 0.5}, ()) for item, value in items]
        (folders[name] / "items.jsonl").write_text("".join(f"{line}\n" for line in lines))
        run = suite_run(suite="sade", protocol="mean_likelihood")
        result = make_result(run, read_items(folders[name]).values(), [], 200, 1.0, 5)
        (folders[name] / "result.json").write_text(result.to_json())
    found = compare_results(folders).metrics
    tests = {kind: of_kind["recall_at_1"].differences["b"].test for kind, of_kind in found.items()}
    assert tests["Relation/x"] == "mcnemar"
    assert tests["Relation"] == tests["average"] == "bootstrap"


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


@pytest.mark.parametrize(("what", "value"), [("protocol", "compodistill"), ("suite", "pope")])
def test_results_of_other_data_or_another_protocol_are_refused(what: str, value: str, tmp_path: Path) -> None:
    first, second = save_result(tmp_path / "a", [1.0, 0.0]), save_result(tmp_path / "b", [1.0, 0.0])
    saved = json.loads((second / "result.json").read_text())
    saved["run"][what] = value
    (second / "result.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"b cannot be compared with a: its {what} is {value}"):
        compare_results({"a": first, "b": second})


def test_results_of_other_items_are_told_apart_in_words(tmp_path: Path) -> None:
    first = save_result(tmp_path / "a", [1.0, 0.0, 1.0], num_items=3)
    second = save_result(tmp_path / "b", [1.0, 0.0], items="e", num_items=2, limit=2)
    expected = r"its items are 2 \(--limit 2\), a's are 3; 1 items are in only one, as swap_obj/2"
    with pytest.raises(UserError, match=f"b cannot be compared with a: {expected}"):
        compare_results({"a": first, "b": second})


def test_results_with_other_answered_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 items of b were answered, 2 of a; 1 items are in only one, as swap_obj/1"):
        compare(tmp_path, [1.0, 0.0], [1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["metrics"].pop("average"), "accuracy of average is None, and 50.0 by the items"),
        (lambda saved: saved["metrics"]["swap_obj"].pop("accuracy"), "accuracy of swap_obj is None, and 50.0"),
        (lambda saved: saved["metrics"]["swap_obj"]["accuracy"].update(value=90), "swap_obj is 90.0, and 50.0"),
        (lambda saved: saved["metrics"].update(more=saved["metrics"]["average"]), "of more is 50.0, and None by"),
    ],
)
def test_metrics_that_are_not_those_of_the_items_are_named(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    first, second = save_result(tmp_path / "a", [1.0, 0.0]), save_result(tmp_path / "b", [1.0, 0.0])
    saved = json.loads((second / "result.json").read_text())
    change(saved)
    (second / "result.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=rf"b/result\.json: .*{message}.*run the same `cdp evaluate` again"):
        compare_results({"a": first, "b": second})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kinds", ["add_att"], "b/result.json: accuracy of swap_obj is 50.0, and 0.0 by the items"),
        ("unit", "1", "b: item 'swap_obj/0' has other kinds or another unit than in .*a"),
        ("counts", {}, "b/result.json: accuracy of swap_obj is 50.0, and 0.0 by the items"),
        ("id", "swap_obj/9", "2 items of b were answered, 2 of a"),
    ],
)
def test_edited_items_are_named(key: str, value: object, message: str, tmp_path: Path) -> None:
    first, second = save_result(tmp_path / "a", [1.0, 0.0]), save_result(tmp_path / "b", [1.0, 0.0])
    edited, other = (second / "items.jsonl").read_text().splitlines()
    (second / "items.jsonl").write_text(f"{json.dumps(json.loads(edited) | {key: value})}\n{other}\n")
    with pytest.raises(UserError, match=message):
        compare_results({"a": first, "b": second})


def test_items_without_the_kinds_that_their_suite_counts_on_are_named(tmp_path: Path) -> None:
    folder = save_result(tmp_path / "a", [1.0, 0.0])
    for file in ("items.jsonl", "result.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("sugarcrepe", "aro"))
    with pytest.raises(UserError, match=r"a: items\*\.jsonl lack a kind or count of aro"):
        compare_results({"a": folder, "b": folder})


def test_a_folder_without_answered_items_is_named(tmp_path: Path) -> None:
    first, second = save_result(tmp_path / "a", [1.0, 0.0]), save_result(tmp_path / "b", [1.0, 0.0])
    (second / "items.jsonl").unlink()
    with pytest.raises(UserError, match=r"b holds no answered items; expected items\*\.jsonl"):
        compare_results({"a": first, "b": second})


def test_a_result_with_grey_pictures_is_the_control_of_one_with_its_own(tmp_path: Path) -> None:
    found = compare(tmp_path, [1.0, 0.0], [0.0, 0.0], blind=True)
    assert [run.blind for run in found.results.values()] == [False, True]
