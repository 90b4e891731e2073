"""VQAv2: free questions about COCO's images, each answered by ten people. Goyal et al., 2017."""

from collections.abc import Iterator
from typing import Any, Final

from stages.evaluation.suites.short_answers import ServerScored, ShortAnswers, people_answers
from stages.evaluation.suites.suite import Item, Protocol, Question
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import SHORT_ANSWER, vqa_v2_accuracy
from storage.errors import UserError

_QUESTIONS: Final = "v2_OpenEnded_mscoco_{}_questions.json"


class VqaV2(ShortAnswers):
    """Soft accuracy on the validation half, over all and by type of answer.

    LLaVA and others report test-dev, whose labels only a server has: see `vqav2-test-dev`.
    """

    name = "vqav2"
    source = "GT-Vision-Lab/VQA, vqaEval.py, as lmms-eval calls it; prompt: haotian-liu/LLaVA"
    fetch = (
        "v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json from visualqa.org/download; "
        "val2014/ is COCO's val2014.zip from cocodataset.org"
    )

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        path, labels = files.need(_QUESTIONS.format("val2014"), "v2_mscoco_val2014_annotations.json")
        given = {}
        for position, record in enumerate(files.records(labels, key="annotations")):
            where = f"{labels}, annotation {position}"
            number, answers = fields(record, where, question_id=int, answers=list)
            given[number] = people_answers(files, answers, where), str(record.get("answer_type", "other"))
        for number, image, text in _questions(files, path.name):
            if number not in given:
                raise UserError(f"{labels} has no answers to question {number} of {path.name}; {self.fetch}")
            words, kind = given[number]
            yield _item(files, number, image, text, "val2014", ("all", kind), words)

    def accuracy(self, answer: str, expected: Any) -> float:
        return vqa_v2_accuracy(answer, expected)


class VqaV2TestDev(ServerScored):
    """No metric here: `answers.json` is for the server, which alone has the labels.

    It holds the processed answers to the questions of the folder; LLaVA adds an empty one for every other question of
    test2015.
    """

    name = "vqav2-test-dev"
    source = "haotian-liu/LLaVA, scripts/convert_vqav2_for_submission.py"
    fetch = (
        "v2_OpenEnded_mscoco_test-dev2015_questions.json from visualqa.org/download; test2015/ is COCO's test2015.zip "
        "from cocodataset.org; answers are scored at eval.ai/web/challenges/challenge-page/830"
    )

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        (path,) = files.need(_QUESTIONS.format("test-dev2015"))
        for number, image, text in _questions(files, path.name):
            yield _item(files, number, image, text, "test2015", ("all",), None)

    def server_entry(self, item_id: str, answer: str) -> dict[str, object]:
        return {"question_id": int(item_id), "answer": answer}


def _questions(files: SuiteFiles, name: str) -> Iterator[Any]:
    """Number, number of the image, and text of each question."""
    path = files.folder / name
    for position, record in enumerate(files.records(path, key="questions")):
        yield fields(record, f"{path}, question {position}", question_id=int, image_id=int, question=str)


def _item(
    files: SuiteFiles, number: int, image: int, text: str, half: str, kinds: tuple[str, ...], given: list[str] | None
) -> Item:
    picture = files.picture(f"{half}/COCO_{half}_{image:012d}.jpg")
    return Item(str(number), kinds, (Question(text + SHORT_ANSWER, (picture,)),), given, unit=str(image))
