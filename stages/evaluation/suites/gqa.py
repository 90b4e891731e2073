"""GQA: questions made from scene graphs, with one answer each. Hudson and Manning, 2019."""

from collections.abc import Iterator
from typing import Any

from stages.evaluation.suites.short_answers import ShortAnswers
from stages.evaluation.suites.suite import Item, Protocol, Question
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import SHORT_ANSWER
from storage.errors import UserError

_FILE = "testdev_balanced_questions.json"


class Gqa(ShortAnswers):
    """Accuracy on testdev_balanced, over all and by structural type.

    An answer is right if it equals the label, in small letters and without periods at its end. lmms-eval also ignores
    other punctuation, so its numbers may be a little higher.
    """

    name = "gqa"
    source = "GQA's eval.py; answers and prompt: haotian-liu/LLaVA, scripts/convert_gqa_for_eval.py"
    fetch = (
        f"{_FILE} of questions1.2.zip and images/ of images.zip from cs.stanford.edu/people/dorarad/gqa/download.html"
    )

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        path = files.first(_FILE, f"questions1.2/{_FILE}", f"questions/{_FILE}")
        records = files.json(path)
        if not isinstance(records, dict) or not records:
            raise UserError(f"{path}: expected an object of questions by id, with at least one; {self.fetch}")
        for key, record in records.items():
            image, text, answer = fields(record, f"{path}, question {key}", imageId=str, question=str, answer=str)
            types = record.get("types")
            kinds = ("all", *([str(types["structural"])] if isinstance(types, dict) and "structural" in types else []))
            question = Question(text + SHORT_ANSWER, (files.picture(f"images/{image}.jpg"),))
            yield Item(key, kinds, (question,), answer, unit=image)

    def accuracy(self, answer: str, expected: Any) -> float:
        return float(answer.rstrip(".").lower() == expected)
