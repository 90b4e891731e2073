"""POPE: whether an object is in the picture, asked of objects that are and of three samplings that are not. Li et al.,
2023.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, with_average
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import LLAVA_TOKENS, SHORT_ANSWER
from stages.evaluation.suites.yes_no import (
    YES_NO_PROTOCOLS,
    answered_yes,
    f1_of_always_yes,
    two_way_question,
    yes_no_counts,
    yes_no_metrics,
    yes_or_no_label,
)
from storage.errors import UserError

LLAVA_QUESTIONS: Final = "llava_pope_test.jsonl"
_FOLDERS: Final = ("", "output/coco/", "coco/")


class Pope(Suite):
    """F1 and its parts for each sampling of absent objects; `average` is their mean.

    LLaVA's folder has the labels in `coco/`; its question file is read where it has labels of its own.
    """

    name = "pope"
    source = "AoiDragon/POPE; parser and metrics: haotian-liu/LLaVA, llava/eval/eval_pope.py"
    fetch = (
        "coco_pope_{random,popular,adversarial}.json from github.com/AoiDragon/POPE, output/coco/; val2014/ is COCO's "
        "val2014.zip from cocodataset.org"
    )
    protocols = YES_NO_PROTOCOLS
    chance = {"accuracy": 50.0}
    main = ("average", "f1")
    all_kinds = ("random", "popular", "adversarial")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for where, kind, record in _records(files):
            number, image, text, label = fields(record, where, question_id=int, image=str, text=str, label=str)
            prompt = text.removesuffix(SHORT_ANSWER) + SHORT_ANSWER
            picture = files.picture(f"val2014/{image}")
            question = two_way_question(prompt, picture, protocol, max_new_tokens=LLAVA_TOKENS)
            yield Item(f"{kind}/{number}", (kind,), (question,), yes_or_no_label(label, where), unit=image)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        is_yes = item.expected == "yes"
        return yes_no_counts(answered_yes(answers[0], is_yes), is_yes)

    def metrics(self, counts: KindCounts) -> Metrics:
        return with_average({kind: yes_no_metrics(sums) for kind, sums in counts.items()})

    def metrics_of_always_yes(self, counts: KindCounts) -> Metrics:
        return f1_of_always_yes(self, counts)


def _records(files: SuiteFiles) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where each record stands, its sampling, and the record."""
    names = [f"{folder}coco_pope_*.json" for folder in _FOLDERS]
    if not files.has(LLAVA_QUESTIONS) or any(path for name in names for path in files.folder.glob(name)):
        for path in files.find(*names):
            for record in files.rows(path):
                yield f"{path}, question {record.get('question_id')}", path.stem.removeprefix("coco_pope_"), record
        return
    for record in files.rows(files.folder / LLAVA_QUESTIONS):
        where = f"{files.folder / LLAVA_QUESTIONS}, question {record.get('question_id')}"
        if "label" not in record:
            raise UserError(f"{where} has no label; put into {files.folder} also {files.fetch}")
        (kind,) = fields(record, where, category=str)
        yield where, kind, record
