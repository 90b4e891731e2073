"""Winoground: two pictures and two captions of the same words in another order. Thrush et al., 2022."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.evaluation.suites.captions import share_unread
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, percent_of_items
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.two_by_two import TWO_BY_TWO_PROTOCOLS, comparisons, two_by_two_questions
from storage.errors import UserError

HARD_TAGS = "why_winoground_hard.json"
"""Diwan et al., 2022: tags by id; items without one (`No Tag`) are hard for their composition alone."""


class Winoground(Suite):
    """Text: the right caption for both pictures; image: the right picture for both captions; group: both.

    Of all items (kind `all`), of each collapsed tag, by the number of main predicates, and of Diwan's tags where
    `why_winoground_hard.json` is there. Image and group compare scores across pictures, which likelihoods are not made
    for: some pictures make every caption likely. With `--protocol compodistill` only captions are chosen: text is the
    mean over both orders of options.
    """

    name = "winoground"
    source = "linzhiqiu/t2v_metrics, dataset.py, get_winoground_acc"
    fetch = (
        "data/examples.jsonl and data/images.zip of facebook/winoground from the Hub, which asks to accept its terms; "
        "or examples.jsonl or data.json beside images/"
    )
    protocols = TWO_BY_TWO_PROTOCOLS
    chance = {"text": 25.0, "image": 25.0, "group": 100 / 6}
    main = ("all", "text")
    all_kinds = ("Object", "Relation", "Both")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        tables = files.tables() or files.find("data/examples.jsonl", "examples.jsonl", "data.json")
        zipped = files.zipped("data/images.zip", "images.zip")
        hard = next((files.json(path) for path in files.find_any(HARD_TAGS, f"data/{HARD_TAGS}")), None)
        if not (hard is None or isinstance(hard, dict)):
            raise UserError(f"{files.folder}: {HARD_TAGS} holds a {type(hard).__name__}; expected an object of tags")
        for path in tables:
            for row, record in enumerate(files.rows(path)):
                number, *captions = fields(record, f"{path}, record {row}", id=int, caption_0=str, caption_1=str)
                pictures = [_picture(files, zipped, record, number, place) for place in (0, 1)]
                questions = two_by_two_questions(captions, pictures, protocol)
                yield Item(str(number), _kinds(record, number, hard), questions, None)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        found = comparisons(answers, protocol)
        if found.first_image is None or found.second_image is None:
            return {"text": found.both_texts, "unread": share_unread(answers)}
        both_images = found.first_image and found.second_image
        return {"text": found.both_texts, "image": both_images, "group": found.both_texts and both_images}

    def metrics(self, counts: KindCounts) -> Metrics:
        return {kind: percent_of_items(sums) for kind, sums in counts.items()}


def _picture(
    files: SuiteFiles, zipped: Mapping[str, SuitePicture], record: Mapping[str, Any], number: int, place: int
) -> SuitePicture:
    named = record.get(f"image_{place}")
    if isinstance(named, SuitePicture):
        return named
    name = Path(named if isinstance(named, str) else f"ex_{number}_img_{place}").name
    name = name if name.endswith(".png") else f"{name}.png"
    return zipped.get(name) or files.picture(f"images/{name}", f"data/images/{name}")


def _kinds(record: Mapping[str, Any], number: int, hard: Mapping[str, Any] | None) -> tuple[str, ...]:
    tag, preds = record.get("collapsed_tag"), record.get("num_main_preds")
    kinds = [tag] if isinstance(tag, str) else []
    kinds += [f"{preds} Main Pred"] if isinstance(preds, int) else []
    if hard is not None:
        tags = hard.get(str(number)) or ["No Tag"]
        if not isinstance(tags, list):
            raise UserError(f"{HARD_TAGS}: item {number} has the tags {tags!r:.100}; expected a list")
        kinds += map(str, tags)
    return (*dict.fromkeys(kind for kind in kinds if kind != "all"), "all")
