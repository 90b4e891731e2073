import json
from pathlib import Path

import pytest

from stages.evaluation.metrics import scored, suite_metrics
from stages.evaluation.suites.vsr import yes_or_no
from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load

ANSWERS = {"Yes": True, "yes, it is.": True, "No.": False, "Yes and no": None, "True": None, "nothing": None, "": None}


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_read_by_its_words(text: str) -> None:
    assert yes_or_no(text) is ANSWERS[text]


def write(folder: Path, split: str, labels: list[object], picture: str = "val2017/1.jpg") -> Path:
    draw(folder / picture)
    lines = [{"image": "1.jpg", "caption": f"The cup is at {n}.", "label": label} for n, label in enumerate(labels)]
    path = folder / "data" / "splits" / split / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_accuracy_is_of_each_split_and_what_cannot_be_read_is_wrong(tmp_path: Path) -> None:
    write(write(tmp_path, "random", [1, 0, 0, 1]), "zeroshot", [0], "images/1.jpg")
    loaded = load("vsr", tmp_path)
    answers = {"random/0": "Yes", "random/1": "no", "random/2": "Yes.", "random/3": "Maybe", "zeroshot/0": "No"}
    items = [scored(item, loaded.suite.count(item, [answers[item.id]], "generate")) for item in loaded.items]
    found = {
        kind: {name: float(each[0]) for name, each in one.items()}
        for kind, one in suite_metrics(loaded.suite, items, 100).items()
    }
    assert found["random"] == {"accuracy": 50.0, "yes_share": 50.0, "unread": 25.0}
    assert found["zeroshot"] == {"accuracy": 100.0, "yes_share": 0.0, "unread": 0.0}


def test_the_statement_is_asked_as_a_question_about_its_picture(tmp_path: Path) -> None:
    (item,) = load("vsr", write(tmp_path, "zeroshot", [1], "train2017/1.jpg")).items
    (question,) = item.questions
    assert question.prompt == 'Is the statement "The cup is at 0." true of the image? Please answer yes or no.'
    assert str(question.pictures[0].source) == str(tmp_path / "train2017" / "1.jpg")
    assert item.unit == "1.jpg"


@pytest.mark.parametrize(("label", "message"), [(2, "label 2; expected 0 or 1"), ("1", "expected label of type int")])
def test_another_label_is_named(tmp_path: Path, label: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"zeroshot/test\.jsonl, record 0: {message}"):
        load("vsr", write(tmp_path, "zeroshot", [label]))


def test_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data/splits/\*/test\.jsonl.*cambridgeltl/visual-spatial-reasoning"):
        load("vsr", tmp_path)
