"""A suite from its folder to its result, with a real model."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.evaluation.answered_items import AnsweredItem, read_items
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.metrics import ScoredItem, scored
from stages.evaluation.result import (
    ItemsFile,
    SuiteRun,
    begun_items,
    items_digest,
    make_result,
    read_result,
)
from stages.evaluation.run_suite import ask_chunk, chunks_of
from storage.errors import UserError
from tests.suite_runs import suite_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two kinds of three pairs each; pictures 0 to 2 serve both."""
    root = tmp_path / "suite"
    (root / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (30, 30), (90 * number, 0, 0)).save(root / f"images/{number}.png")
    for kind in ("swap_obj", "add_att"):
        pairs = {
            str(number): {"filename": f"{number}.png", "caption": f"{kind} red {number}", "negative_caption": "blue"}
            for number in range(3)
        }
        (root / f"{kind}.json").write_text(json.dumps(pairs))
    return root


@pytest.fixture
def answerer(model: Any, processor: Any) -> Answerer:
    return Answerer(model, processor, EvaluationConfig(batch_size=4))


def run_of(loaded: LoadedSuite, **other: Any) -> SuiteRun:
    asked = {"protocol": loaded.protocol, "blind": loaded.config.blind, "items": items_digest(loaded.items)}
    return suite_run(**asked | other)


def ask(answerer: Answerer, loaded: LoadedSuite, output: Path, limit: int | None = None) -> ItemsFile:
    with begun_items(output, run_of(loaded)) as items:
        left = [item for item in loaded.items if item.id not in items.answered]
        for chunk in chunks_of(left[:limit]):
            items.append(ask_chunk(answerer, loaded, chunk))
    return items


@pytest.mark.parametrize("protocol", ["likelihood", "mean_likelihood", "yes_probability", "compodistill"])
def test_a_killed_run_goes_on_and_ends_like_an_undisturbed_one(
    protocol: Any, folder: Path, answerer: Answerer, tmp_path: Path
) -> None:
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder, protocol=protocol))
    ask(answerer, loaded, tmp_path / "whole")
    whole = read_items(tmp_path / "whole")
    assert set(whole) == {f"{kind}/{number}" for kind in ("swap_obj", "add_att") for number in range(3)}
    ask(answerer, loaded, tmp_path / "killed", limit=4)
    path = tmp_path / "killed/items.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # a kill in the middle of a line
    assert len(ask(answerer, loaded, tmp_path / "killed").answered) == 3
    killed = read_items(tmp_path / "killed")
    assert set(killed) == set(whole)
    assert {key: one.scored for key, one in killed.items()} == {key: one.scored for key, one in whole.items()}


def test_a_result_says_what_was_asked_and_survives_json(folder: Path, answerer: Answerer, tmp_path: Path) -> None:
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder))
    ask(answerer, loaded, tmp_path / "out")
    result = make_result(run_of(loaded), read_items(tmp_path / "out").values(), [], 100, 2.0, 6)
    assert result.num_items == {"add_att": 3, "swap_obj": 3}
    assert result.items_per_s == 3.0
    assert result.main == result.metrics["average"]["accuracy"]
    assert result.main.value == pytest.approx(
        (result.metrics["add_att"]["accuracy"].value + result.metrics["swap_obj"]["accuracy"].value) / 2
    )
    assert result.main.chance == 50
    (tmp_path / "out/result.json").write_text(result.to_json())
    assert read_result(tmp_path / "out") == result == read_result(tmp_path / "out/result.json")


def test_counts_can_be_made_again_from_the_saved_answers(folder: Path, answerer: Answerer, tmp_path: Path) -> None:
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder))
    ask(answerer, loaded, tmp_path / "out")
    saved = read_items(tmp_path / "out")
    for item in loaded.items:
        again = loaded.suite.count(item, saved[item.id].answers, loaded.protocol)
        assert again == saved[item.id].scored.counts


def test_answers_of_another_run_are_not_gone_on_with(folder: Path, answerer: Answerer, tmp_path: Path) -> None:
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder))
    ask(answerer, loaded, tmp_path / "out")
    for name, value in {"weights": "x", "blind": True, "protocol": "compodistill"}.items():
        with (
            pytest.raises(UserError, match=f"another run: its {name} is .*, this command's is {value}"),
            begun_items(tmp_path / "out", run_of(loaded, **{name: value})),
        ):
            pass
    with begun_items(tmp_path / "out", run_of(loaded, model="elsewhere")) as items:
        assert len(items.answered) == 6


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"num_items": 4, "limit": 2}, {"num_items": 6}, r"its items are 4 \(--limit 2\), this command's are 6;"),
        ({"num_items": 6}, {"num_items": 6}, "its 6 items are as many as this command's, and some have other ids"),
        ({}, {"num_items": 6}, "its items are not this command's"),
    ],
)
def test_answers_to_other_items_are_told_apart_in_words(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with begun_items(tmp_path, suite_run(items="x", **before)):
        pass
    with pytest.raises(UserError, match=message), begun_items(tmp_path, suite_run(items="y", **now)):
        pass


def test_another_process_waits_until_the_first_has_made_room_for_the_answers(
    folder: Path, answerer: Answerer, tmp_path: Path
) -> None:
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder))
    ask(answerer, loaded, tmp_path / "out")
    run = run_of(loaded, weights="another student")

    def second() -> int:
        with begun_items(tmp_path / "out", run, rank=1, replace=True) as items:
            return len(items.answered)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        with begun_items(tmp_path / "out", run, replace=True) as items:
            assert not items.answered
        assert waiting.result(10) == 0


def test_the_digest_of_items_is_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    here = items_digest(load_suite("sugarcrepe", SuiteConfig(data=folder)).items)
    folder.rename(tmp_path / "elsewhere")
    assert items_digest(load_suite("sugarcrepe", SuiteConfig(data=tmp_path / "elsewhere")).items) == here
    fewer = load_suite("sugarcrepe", SuiteConfig(data=tmp_path / "elsewhere", limit=2))
    assert [item.id for item in fewer.items] == ["add_att/0", "add_att/1", "swap_obj/0", "swap_obj/1"]
    assert items_digest(fewer.items) != here


def test_missing_images_are_an_error_or_counted_and_never_dropped(folder: Path) -> None:
    (folder / "images/1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images of sugarcrepe are missing, so 2 of 6 items .*1\.png.*val2017"):
        load_suite("sugarcrepe", SuiteConfig(data=folder))
    loaded = load_suite("sugarcrepe", SuiteConfig(data=folder, allow_missing_images=True))
    assert ([item.id for item in loaded.missing], len(loaded.items)) == (["add_att/1", "swap_obj/1"], 4)
    answered = [AnsweredItem(item.id, (), scored(item, {"accuracy": 1})) for item in loaded.items]
    result = make_result(run_of(loaded), answered, loaded.missing, 100, 1.0, 4)
    assert (result.num_missing, result.num_missing_of) == (2, {"add_att": 1, "swap_obj": 1})
    for number in (0, 2):
        (folder / f"images/{number}.png").unlink()
    with pytest.raises(UserError, match="3 of 3 images"):
        load_suite("sugarcrepe", SuiteConfig(data=folder, allow_missing_images=True))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff"])
def test_what_is_no_result_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no result of `cdp evaluate`"):
        read_result(path)


def test_a_result_of_a_suite_that_this_version_does_not_have_is_named(tmp_path: Path) -> None:
    result = make_result(
        suite_run(), [AnsweredItem("1", (), ScoredItem(("a",), "1", {"accuracy": 1}))], [], 100, 1.0, 1
    )
    (tmp_path / "result.json").write_text(result.to_json().replace('"sugarcrepe"', '"newer"'))
    with pytest.raises(UserError, match=r"result\.json is a result of a suite 'newer'; this version has sugarcrepe"):
        read_result(tmp_path)
