"""POPE: whether an object is in the picture, asked of objects that are and of three samplings that are not. Li et al.,
2023.
"""

from collections.abc import Iterator, Sequence

from stages.evaluation.suites.suite import (
    Answer,
    Counts,
    Item,
    KindCounts,
    Metrics,
    Protocol,
    Question,
    Suite,
    with_average,
)
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.yes_no import says_yes, yes_no_counts, yes_no_metrics

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


class Pope(Suite):
    """F1 and its parts for each sampling of absent objects; `average` is their mean."""

    name = "pope"
    source = "AoiDragon/POPE; parser and metrics: haotian-liu/LLaVA, llava/eval/eval_pope.py"
    fetch = (
        "coco_pope_{random,popular,adversarial}.json from github.com/AoiDragon/POPE, output/coco/; val2014/ is COCO's "
        "val2014.zip from cocodataset.org"
    )
    protocols = ("generate",)
    chance = {"accuracy": 50.0}
    main = ("average", "f1")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for path in files.find("coco_pope_*.json", "output/coco/coco_pope_*.json"):
            kind = path.stem.removeprefix("coco_pope_")
            for record in files.rows(path):
                where = f"{path}, question {record.get('question_id')}"
                number, image, text, label = fields(record, where, question_id=int, image=str, text=str, label=str)
                question = Question(text + SHORT_ANSWER, (files.picture(f"val2014/{image}"),))
                yield Item(f"{kind}/{number}", (kind,), (question,), label, unit=image)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return yes_no_counts(says_yes(answers[0]), item.expected == "yes")

    def metrics(self, counts: KindCounts) -> Metrics:
        return with_average({kind: yes_no_metrics(sums) for kind, sums in counts.items()})
