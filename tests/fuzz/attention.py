"""Files that `cdp compare-attention` reads: objects with a mask, and the answers of a suite."""

import json
from pathlib import Path

from PIL import Image

from stages.evaluation.answered_items import item_line
from stages.evaluation.attention.answers import split_by_answers
from stages.evaluation.attention.objects import read_objects
from stages.evaluation.attention.suite_folders import read_run
from stages.evaluation.suites.suite import Item, Question
from tests.fuzz.attempt import Target
from tests.fuzz.runs import any_of_its_files
from tests.suite_runs import suite_run


def make(root: Path) -> None:
    """Two pictures by boxes, one by its mask, and an answered item."""
    (root / "suite").mkdir(parents=True)
    lines = [
        {"image": "a.png", "boxes": [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 0.1]]},
        {"sample": "b", "boxes": [[0.5, 0.5, 1, 1]]},
        {"sha256": "0" * 64, "mask": "mask.png"},
    ]
    (root / "objects.json").write_text(json.dumps(lines))
    Image.linear_gradient("L").resize((20, 10)).save(root / "mask.png")
    (root / "suite/run.json").write_text(suite_run().to_json())
    item = Item("a", ("a",), (Question("?", ()),), None)
    (root / "suite/items.jsonl").write_text(f"{item_line(item, ['A'], {'accuracy': 1}, [['0']])}\n")


def read(root: Path) -> None:
    """All of it; boxes and answers may differ."""
    objects = read_objects(root / "objects.json")
    for places in (objects.by_sample, objects.by_image, objects.by_digest):
        for one in places.values():
            one.covered()
    run = read_run(root / "suite")
    split_by_answers(root / "suite", run, {"0": [(0.25, 0.5)]})


TARGETS = [Target("attention files", make, read, any_of_its_files)]
