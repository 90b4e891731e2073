"""VSR: whether a statement about where things are is true of a picture. Liu et al., 2023."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Question, Suite
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError

STATEMENT_QUESTION: Final = 'Is the statement "{caption}" true of the image? Please answer yes or no.'
"""Ours: the makers train a classifier, and ask nothing."""


class Vsr(Suite):
    """Accuracy of each split (kinds `random`, `zeroshot`); about half of the statements are true.

    The splits share items, so quote one of them, not the average. `yes_share` is the share of answers that say yes;
    an answer with both words or neither, `unread`, is wrong.
    """

    name = "vsr"
    source = "cambridgeltl/visual-spatial-reasoning; parser: open-compass/VLMEvalKit, yorn.py"
    fetch = (
        "data/splits/{random,zeroshot}/test.jsonl from github.com/cambridgeltl/visual-spatial-reasoning; images/ with "
        "those of COCO's train2017.zip and val2017.zip that it names, or train2017/ and val2017/ themselves"
    )
    protocols = ("generate",)
    chance = {"accuracy": 50.0}
    main = ("average", "accuracy")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for path in files.find("data/splits/*/test.jsonl", "splits/*/test.jsonl", "*/test.jsonl"):
            kind = path.parent.name
            for number, record in enumerate(files.rows(path)):
                image, caption, label = fields(record, f"{path}, record {number}", image=str, caption=str, label=int)
                if label not in (0, 1):
                    raise UserError(f"{path}, record {number}: label {label}; expected 0 or 1")
                places = [f"{folder}/{image}" for folder in ("images", "data/images", "train2017", "val2017")]
                question = Question(STATEMENT_QUESTION.format(caption=caption), (files.picture(*places),))
                yield Item(f"{kind}/{number}", (kind,), (question,), label, unit=image)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        said = yes_or_no(answers[0])
        return {
            "accuracy": said is not None and said == item.expected,
            "yes_share": said or False,
            "unread": said is None,
        }


def yes_or_no(answer: Answer) -> bool | None:
    """Whether the word "yes" or the word "no" is in an answer; None where both are, or neither."""
    assert isinstance(answer, str)
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words
