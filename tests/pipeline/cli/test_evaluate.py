"""`cdp evaluate`: the tables that come of results."""

from pipeline.cli.evaluate import result_table
from stages.evaluation.answered_items import AnsweredItem
from stages.evaluation.metrics import ScoredItem
from stages.evaluation.result import make_result
from stages.evaluation.suites.suite import Item
from tests.suite_runs import suite_run


def answered(kind: str, number: int, **counts: float) -> AnsweredItem:
    return AnsweredItem(f"{kind}/{number}", ("x",), ScoredItem((kind,), str(number), counts))


def test_items_without_their_images_stand_beside_the_kinds_that_lack_them() -> None:
    found = [answered("swap_obj", number, accuracy=1) for number in range(3)] + [answered("add_att", 0, accuracy=0)]
    lost = [Item(f"{kind}/9{at}", (kind,), (), None) for at, kind in enumerate(["swap_obj", "swap_obj", "add_obj"])]
    table = result_table(make_result(suite_run(), found, lost, 100, 1.0, 4), "model")
    assert table.header == ["kind", "items", "accuracy", "without images"]
    assert [[row[0], row[1], row[-1]] for row in table.rows] == [
        ["swap_obj", "3", "2"],
        ["add_att", "1", "0"],
        ["average", "", "0"],
        ["add_obj", "0", "1"],
        ["guessing", "", ""],
    ]
    assert "3 items without their images left out" in table.title
    assert result_table(make_result(suite_run(), found, [], 100, 1.0, 4), "model").header[-1] == "accuracy"


def test_a_suite_whose_labels_a_server_has_shows_how_many_items_were_asked() -> None:
    run = suite_run(suite="vizwiz-test", protocol="generate")
    result = make_result(run, [answered("all", number) for number in range(3)], [], 100, 1.0, 3)
    assert result.main is None
    table = result_table(result, "model")
    assert (table.header, table.rows) == (["kind", "items"], [["all", "3"]])
