import json
from pathlib import Path

import pytest

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values


def record(number: int, first: str, second: str, negative: str) -> dict[str, object]:
    texts = {"caption": first, "caption2": second, "negative_caption": negative}
    return {"id": number, "filename": "1.png", **texts}


SCORES = {"high": -1.0, "higher": -0.5, "middle": -2.0, "low": -3.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ITT right once of four: both captions above, the first alone, the second alone, a tie."""
    (tmp_path / "data").mkdir()
    records = [
        record(0, "high", "higher", "middle"),
        record(1, "high", "low", "middle"),
        record(2, "low", "high", "middle"),
        record(3, "high", "high", "high"),
    ]
    (tmp_path / "data" / "swap_att.json").write_text(json.dumps(records))
    draw(tmp_path / "val2017" / "1.png")
    return tmp_path


@pytest.mark.parametrize("protocol", [None, "mean_likelihood", "yes_probability"])
def test_itt_wants_both_captions_above_the_negative(folder: Path, protocol: str | None) -> None:
    found = values(load("sugarcrepe_pp", folder, protocol=protocol), SCORES)
    assert found["swap_att"] == {"ITT": 25.0, "Image-P1-Neg": 50.0, "Image-P2-Neg": 50.0}


def test_by_letters_itt_is_the_mean_over_orders_of_both_pairs(folder: Path) -> None:
    loaded = load("sugarcrepe_pp", folder, protocol="compodistill")
    # Of the tie B is said, so each of its pairs is right in the second order.
    assert values(loaded, SCORES)["average"] == {
        "ITT": 100 * (1 + 0.5) / 4,
        "ITT_first_order": 25.0,
        "ITT_second_order": 50.0,
        "ITT_all_orders": 25.0,
        "Image-P1-Neg": 100 * 2.5 / 4,
        "Image-P2-Neg": 100 * 2.5 / 4,
        "unread": 0.0,
    }
    always_a = values(loaded, SCORES, letter="A")["average"]
    assert (always_a["ITT"], always_a["ITT_all_orders"]) == (50.0, 0.0)


def test_chance_is_a_third_by_likelihood_and_a_quarter_by_letters(folder: Path) -> None:
    suite = load("sugarcrepe_pp", folder).suite
    assert suite.chance_of("swap_att", "ITT", "likelihood") == pytest.approx(100 / 3)
    assert suite.chance_of("swap_att", "ITT", "compodistill") == 25.0
    assert suite.chance_of("swap_att", "Image-P1-Neg", "compodistill") == 50.0


def test_sugarcrepes_own_layout_is_named(folder: Path) -> None:
    (folder / "data" / "swap_att.json").write_text(json.dumps({"0": {"filename": "1.png"}}))
    with pytest.raises(UserError, match=r"swap_att\.json, record 0: expected filename of type str, found only 0"):
        load("sugarcrepe_pp", folder)


def test_a_record_without_second_caption_is_named(folder: Path) -> None:
    (folder / "data" / "swap_att.json").write_text(json.dumps([{"filename": "1.png", "caption": "x"}]))
    with pytest.raises(UserError, match=r"record 0: expected caption2"):
        load("sugarcrepe_pp", folder)
