import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import UserError
from tests.docs.markdown import ROOT
from tests.stages.evaluation.suites.scorer import draw, load, values

SCORES = {"good": -1.0, "bad": -2.0, "worse": -3.0, "best": -0.5}


def line(number: int, branch: str, source: str, references: list[str], answer: int, **more: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "branch": branch,
        "source": source,
        "image": "images/1.png",
        "references": references,
        "answer_index": answer,
        **more,
    }


LINES = [
    line(0, "Relation", "vg", ["bad", "good"], 1),
    line(1, "Relation", "vg", ["good", "good"], 0),  # a tie
    line(2, "Relation", "vl_checklist", ["good", "best"], 0),
    line(3, "Relation", "vl_checklist", ["worse", "bad"], 0),
    line(4, "Content", "coco", ["worse", "bad", "good"], 2, box=[1, 0, 5, 4]),
]


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "sade.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    draw(folder / "images" / "1.png")
    return folder


def test_a_branch_is_the_mean_over_its_sources_and_chance_follows_the_number_of_references(tmp_path: Path) -> None:
    third = round(100 / 3, 6)
    assert values(load("sade", write(tmp_path, LINES)), SCORES) == {
        "Relation/vg": {"recall_at_1": 50.0, "chance": 50.0},
        "Relation/vl_checklist": {"recall_at_1": 0.0, "chance": 50.0},
        "Content/coco": {"recall_at_1": 100.0, "chance": third},
        "Relation": {"recall_at_1": 25.0, "chance": 50.0},
        "Content": {"recall_at_1": 100.0, "chance": third},
        "average": {"recall_at_1": 62.5, "chance": pytest.approx((50 + third) / 2)},
    }


def test_the_makers_score_is_the_mean_over_tokens(tmp_path: Path) -> None:
    loaded = load("sade", write(tmp_path, LINES))
    assert loaded.protocol == "mean_likelihood"
    assert "compodistill" not in loaded.suite.protocols


def test_a_box_is_cut_out_of_the_picture(tmp_path: Path) -> None:
    items = load("sade", write(tmp_path, LINES)).items
    assert items[4].questions[0].pictures[0].load(10**6, "ignore").size == (4, 4)
    assert items[0].questions[0].pictures[0].load(10**6, "ignore").size == (8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_index": 2}, "answer_index 2; expected 0 to 1"),
        ({"answer_index": "1"}, "expected answer_index of type int, found '1'"),
        ({"references": ["x"]}, "expected two texts or more"),
        ({"references": ["x", 1]}, "expected two texts or more"),
        ({"branch": "a/b"}, "expected a name without a slash"),
        ({"box": [1, 2, 3]}, "expected left, top, right, bottom"),
        ({"box": [3, 0, 3, 9]}, "is empty"),
        ({"image": "../../x.png"}, "leaves the folder"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("sade", write(tmp_path, [LINES[0], LINES[1] | change]))


def test_an_empty_folder_says_how_a_line_looks_and_where_the_data_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.jsonl.*id, branch, source, image, references.*TeleeMa/SADE"):
        load("sade", tmp_path)


def test_the_converter_of_the_docs_gives_what_aro_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [
        block.partition("```")[0]
        for page in sorted((ROOT / "docs").glob("*.md"))
        for block in page.read_text("utf-8").split("```python\n")[1:]
    ]
    (converter,) = [block for block in blocks if "answer_index" in block]
    box = {"bbox_x": 2, "bbox_y": 1, "bbox_w": 5, "bbox_h": 3}
    record = {"image_path": "1.jpg", "true_caption": "good", "false_caption": "bad", "relation_name": "on", **box}
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps([record]))
    draw(tmp_path / "images" / "1.jpg")
    monkeypatch.chdir(tmp_path)
    exec(converter, {})
    (ours,) = load("sade", tmp_path, protocol="likelihood").items
    (theirs,) = load("aro", tmp_path, protocol="likelihood").items
    assert ours.questions == theirs.questions
