"""VizWiz: questions of blind people about pictures they took, each answered by ten people. Gurari et al., 2018."""

from collections.abc import Iterator
from typing import Any, Final

from stages.evaluation.suites.short_answers import ServerScored, ShortAnswers, people_answers
from stages.evaluation.suites.suite import Item, Protocol, Question
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import SHORT_ANSWER, evalai_accuracy

_SUFFIX: Final = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
_FOLDERS: Final = ("", "Annotations/", "annotations/")


class VizWiz(ShortAnswers):
    """Soft accuracy on the validation part, over all and by type of answer.

    Published numbers are mostly of the test part, whose labels only a server has: see `vizwiz-test`.
    """

    name = "vizwiz"
    source = "lmms-eval, tasks/vizwiz_vqa/utils.py; prompt: haotian-liu/LLaVA"
    fetch = "val.json of Annotations.zip and val/ of val.zip from vizwiz.org/tasks-and-datasets/vqa"

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        path = files.first(*(f"{folder}val.json" for folder in _FOLDERS))
        for position, record in enumerate(files.records(path)):
            where = f"{path}, question {position}"
            image, text, answers = fields(record, where, image=str, question=str, answers=list)
            given = people_answers(files, answers, where)
            kinds = ("all", str(record.get("answer_type", "other")))
            yield Item(image, kinds, (_question(files, "val", image, text),), given)

    def accuracy(self, answer: str, expected: Any) -> float:
        return evalai_accuracy(answer, expected)


class VizWizTest(ServerScored):
    """No metric here: `answers.json` is for the server, which alone has the labels."""

    name = "vizwiz-test"
    source = "haotian-liu/LLaVA, scripts/convert_vizwiz_for_submission.py"
    fetch = (
        "test.json of Annotations.zip and test/ of test.zip from vizwiz.org/tasks-and-datasets/vqa; answers are scored "
        "at eval.ai/web/challenges/challenge-page/1911"
    )

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        path = files.first(*(f"{folder}test.json" for folder in _FOLDERS))
        for position, record in enumerate(files.records(path)):
            image, text = fields(record, f"{path}, question {position}", image=str, question=str)
            yield Item(image, ("all",), (_question(files, "test", image, text),), None)

    def server_entry(self, item_id: str, answer: str) -> dict[str, object]:
        return {"image": item_id, "answer": answer}


def _question(files: SuiteFiles, part: str, image: str, text: str) -> Question:
    # `capitalize` makes the other letters small, as the published prompt has them.
    return Question(text.capitalize() + _SUFFIX, (files.picture(f"{part}/{image}"),))
