"""Suites put to a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.loaded_suite import LoadedSuite
from stages.evaluation.result import items_digest
from stages.evaluation.run_suite import ask_chunk, chunks_of
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.suite import Question
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import draw, load, write_json, write_lines


def asked(model: Any, processor: Any, loaded: LoadedSuite) -> list[dict[str, Any]]:
    answerer = Answerer(model, processor, EvaluationConfig(batch_size=4))
    saved = "".join(ask_chunk(answerer, loaded, chunk) for chunk in chunks_of(loaded.items))
    return [json.loads(line) for line in saved.splitlines()]


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    records = [
        {"question_id": number, "image": "a.jpg", "text": f"Is there a {name}?", "label": label}
        for number, (name, label) in enumerate([("square", "yes"), ("circle", "no"), ("triangle", "no")])
    ]
    write_lines(tmp_path / "coco_pope_random.json", records)
    draw(tmp_path / "val2014/a.jpg")
    return tmp_path


def test_yes_over_no_is_decided_by_the_first_tokens_of_both_words(model: Any, processor: Any, pope: Path) -> None:
    lines = asked(model, processor, load("pope", pope, protocol="yes_over_no"))
    assert len(lines) == 3
    for line in lines:
        (((yes, num_tokens, end), (no, _, _)),) = line["answers"]
        assert (num_tokens, end) == (1, 0)
        assert yes != no
        said_yes = line["counts"]["true_positives"] + line["counts"]["false_positives"]
        assert said_yes == (yes > no)


def test_words_that_begin_with_the_same_token_cannot_be_told_apart(model: Any, processor: Any, pope: Path) -> None:
    answerer = Answerer(model, processor, EvaluationConfig())
    picture = SuitePicture(PictureFile(pope / "val2014/a.jpg"))
    question = Question("Is it red?", (picture,), ("Yes", "Yes it is"), first_token_only=True)
    with pytest.raises(UserError, match=r"begins 'Yes' and 'Yes it is' with the same token.*--protocol generate"):
        answerer.answers([question])


def r_bench_masks(folder: Path) -> Path:
    question = {"question_id": 0, "image": "0.png", "text": "Is the dog on the box?", "label": "yes"}
    boxes = {"subject": "dog", "object": "box", "sub_box": [0, 0, 1, 1], "obj_box": [0, 0, 1, 1]}
    write_json(folder / "data_filterd/instance-level_filterd.json", [question | boxes])
    for number in range(1, 6):
        write_json(folder / f"data_filterd/instance-level_ids_{number}.json", [0])
    draw(folder / "images/0.png")
    (folder / "data_filterd/instance_mask").mkdir()
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    Image.fromarray(mask).save(folder / "data_filterd/instance_mask/0.png")
    return folder


def test_masked_pictures_are_asked_and_named_the_same_wherever_they_lie(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    first = r_bench_masks(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    loaded = load("r-bench-masks", first)
    assert items_digest(loaded.items) == items_digest(load("r-bench-masks", tmp_path / "second").items)
    assert items_digest(loaded.items) != items_digest(load("r-bench-boxes", first).items)
    (line,) = asked(model, processor, loaded)
    assert isinstance(line["answers"][0], str)
    assert sum(count for name, count in line["counts"].items() if name != "accuracy") == 1
