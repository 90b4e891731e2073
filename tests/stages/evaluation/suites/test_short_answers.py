"""VQAv2, VizWiz, GQA and TextVQA."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.answered_items import AnsweredItem
from stages.evaluation.metrics import ScoredItem
from stages.evaluation.result import write_server_files
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import (
    draw,
    load,
    metrics_of,
    pictures,
    prompts,
    write_json,
    write_lines,
)

SUFFIX = "\nAnswer the question using a single word or phrase."
TEN = [{"answer": "red", "answer_id": n, "answer_confidence": "yes"} for n in range(3)] + [
    {"answer": "a blue", "answer_id": n, "answer_confidence": "yes"} for n in range(3, 10)
]


def vqa_questions(half: str) -> dict[str, Any]:
    return {"questions": [{"question_id": 10 * n, "image_id": 42, "question": f"What colour {n}?"} for n in (1, 2)]}


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    write_json(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", vqa_questions("val2014"))
    labels = [
        {"question_id": 10, "answer_type": "other", "multiple_choice_answer": "blue", "answers": TEN},
        {
            "question_id": 20,
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes"}] * 10,
        },
    ]
    write_json(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": labels})
    draw(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    return tmp_path


def test_vqav2_is_scored_over_all_and_by_type_of_answer(vqav2: Path) -> None:
    loaded = load("vqav2", vqav2)
    assert prompts(loaded) == [f"What colour 1?{SUFFIX}", f"What colour 2?{SUFFIX}"]
    assert {item.unit for item in loaded.items} == {"42"}
    assert metrics_of(loaded, {"10": ["Red."], "20": ["no"]}) == {
        "all": {"accuracy": 45},
        "other": {"accuracy": 90},
        "yes/no": {"accuracy": 0},
    }
    assert metrics_of(loaded, {"10": ["Blue"], "20": ["Yes"]})["all"] == {"accuracy": 100}


def test_vqav2_without_labels_or_with_others_is_refused(vqav2: Path) -> None:
    path = vqav2 / "v2_mscoco_val2014_annotations.json"
    write_json(path, {"annotations": [{"question_id": 10, "answers": TEN}]})
    with pytest.raises(UserError, match=r"annotations\.json has no answers to question 20.*visualqa\.org"):
        load("vqav2", vqav2)
    write_json(path, {"annotations": [{"question_id": 10, "answers": []}]})
    with pytest.raises(UserError, match="annotation 0 has no answers"):
        load("vqav2", vqav2)
    write_json(path, [])
    with pytest.raises(UserError, match="expected an object with a list 'annotations'"):
        load("vqav2", vqav2)
    path.unlink()
    with pytest.raises(UserError, match=r"lacks v2_mscoco_val2014_annotations\.json.*visualqa\.org/download"):
        load("vqav2", vqav2)


def answered(key: str, text: str) -> AnsweredItem:
    return AnsweredItem(key, (text,), ScoredItem(("all",), key, {}))


def test_test_dev_gives_no_metric_but_a_file_for_the_server(tmp_path: Path) -> None:
    write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", vqa_questions("test2015"))
    draw(tmp_path / "test2015/COCO_test2015_000000000042.jpg")
    loaded = load("vqav2-test-dev", tmp_path)
    assert metrics_of(loaded, {"10": ["red"], "20": ["no"]}) == {"all": {}}
    paths = write_server_files(tmp_path, "vqav2-test-dev", [answered("10", "A Red  Car."), answered("20", "no")])
    assert paths == [tmp_path / "answers.json"]
    assert json.loads(paths[0].read_text()) == [
        {"question_id": 10, "answer": "red car"},
        {"question_id": 20, "answer": "no"},
    ]


def test_suites_with_labels_write_no_file_for_a_server(tmp_path: Path) -> None:
    assert write_server_files(tmp_path, "gqa", [answered("10", "no")]) == []
    assert list(tmp_path.iterdir()) == []


def test_vizwiz_asks_in_small_letters_and_may_be_told_that_it_cannot_be_answered(tmp_path: Path) -> None:
    records = [
        {"image": "VizWiz_val_00000000.jpg", "question": "What BRAND is it?", "answers": TEN, "answer_type": "other"},
        {
            "image": "VizWiz_val_00000001.jpg",
            "question": "ok?",
            "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10,
            "answer_type": "unanswerable",
        },
    ]
    write_json(tmp_path / "Annotations/val.json", records)
    draw(tmp_path / "val/VizWiz_val_00000000.jpg", tmp_path / "val/VizWiz_val_00000001.jpg")
    loaded = load("vizwiz", tmp_path)
    assert prompts(loaded)[0] == (
        f"What brand is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SUFFIX}"
    )
    found = metrics_of(loaded, {"VizWiz_val_00000000.jpg": ["red"], "VizWiz_val_00000001.jpg": ["Unanswerable"]})
    assert found == {"all": {"accuracy": 95}, "other": {"accuracy": 90}, "unanswerable": {"accuracy": 100}}


def test_vizwiz_test_is_for_the_server_by_image(tmp_path: Path) -> None:
    write_json(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is it?"}])
    draw(tmp_path / "test/VizWiz_test_00000000.jpg")
    (item,) = load("vizwiz-test", tmp_path).items
    (path,) = write_server_files(tmp_path, "vizwiz-test", [answered(item.id, "The can.")])
    assert json.loads(path.read_text()) == [{"image": "VizWiz_test_00000000.jpg", "answer": "can"}]
    with pytest.raises(UserError, match=r"holds no val\.json.*vizwiz\.org"):
        load("vizwiz", tmp_path)


def test_gqa_wants_the_very_answer(tmp_path: Path) -> None:
    records = {
        str(number): {
            "question": f"Is it {number}?",
            "answer": answer,
            "imageId": "n1",
            "types": {"structural": kind, "semantic": "rel"},
        }
        for number, (answer, kind) in enumerate([("yes", "verify"), ("left", "query"), ("a dog", "query")])
    }
    write_json(tmp_path / "questions1.2/testdev_balanced_questions.json", records)
    draw(tmp_path / "images/n1.jpg")
    loaded = load("gqa", tmp_path)
    assert prompts(loaded)[0] == f"Is it 0?{SUFFIX}"
    found = metrics_of(loaded, {"0": ["Yes."], "1": ["left!"], "2": ["dog"]})
    assert found == {"all": {"accuracy": 33.3333}, "verify": {"accuracy": 100}, "query": {"accuracy": 0}}
    write_json(tmp_path / "questions1.2/testdev_balanced_questions.json", [])
    with pytest.raises(UserError, match=r"expected an object of questions by id.*cs\.stanford\.edu"):
        load("gqa", tmp_path)


@pytest.fixture
def textvqa(tmp_path: Path) -> Path:
    words = ["red"] * 3 + ["Blue."] * 7
    data = [
        {"image_id": "ab", "question": "What is the Colour?", "answers": words},
        {"image_id": "ab", "question": "What is the make?", "answers": ["canon"] * 10},
    ]
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    draw(tmp_path / "train_images/ab.jpg")
    return tmp_path


def test_textvqa_without_ocr_asks_the_bare_question(textvqa: Path) -> None:
    loaded = load("textvqa", textvqa)
    assert prompts(loaded)[0] == f"What is the Colour?{SUFFIX}"
    assert pictures(loaded, textvqa) == ["train_images/ab.jpg"] * 2
    assert metrics_of(loaded, {"ab/0": ["Red"], "ab/1": ["nikon"]}) == {"all": {"accuracy": 45}}


def test_textvqa_with_ocr_asks_llavas_prompt_and_finds_answers_by_image_and_question(textvqa: Path) -> None:
    texts = [
        f"what is the make?\nReference OCR token: Canon, EOS{SUFFIX}",
        f"Reference OCR token: Canon, EOS\nWhat is the colour?{SUFFIX}",
    ]
    rows = [{"question_id": "ab", "image": "ab.jpg", "text": text} for text in texts]
    write_lines(textvqa / "llava_textvqa_val_v051_ocr.jsonl", rows)
    loaded = load("textvqa-ocr", textvqa)
    assert prompts(loaded) == texts
    lengths = [load(name, textvqa).items[0].questions[0].max_new_tokens for name in ("textvqa-ocr", "textvqa")]
    assert lengths == [128, 16]
    assert metrics_of(loaded, {"ab/0": ["Canon"], "ab/1": ["blue"]}) == {"all": {"accuracy": 100}}
    write_lines(textvqa / "llava_textvqa_val_v051_ocr.jsonl", [rows[0] | {"text": "Who?\n"}])
    with pytest.raises(UserError, match=r"question 0: TextVQA_0.5.1_val.json has no answers to 'who\?' of image ab"):
        load("textvqa-ocr", textvqa)


def test_textvqa_with_ocr_needs_llavas_question_file(textvqa: Path) -> None:
    with pytest.raises(UserError, match=r"lacks llava_textvqa_val_v051_ocr\.jsonl.*eval\.zip"):
        load("textvqa-ocr", textvqa)
