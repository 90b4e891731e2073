"""Suites of questions with short free answers: how these are counted, or handed to the server that has the labels."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, percent_by_kind
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import evalai_answer
from storage.errors import UserError


class ShortAnswers(Suite):
    """An item is one question, whose written answer is compared with what people said."""

    protocols = ("generate",)
    main = ("all", "accuracy")

    @abstractmethod
    def accuracy(self, answer: str, expected: Any) -> float:
        """What an answer gets, from 0 to 1."""

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return {"accuracy": self.accuracy(_written(answers), item.expected)}

    def metrics(self, counts: KindCounts) -> Metrics:
        return percent_by_kind(counts)


class ServerScored(Suite):
    """An item is one question whose label a server alone has: no metric, and `answers.json` for the server."""

    protocols = ("generate",)
    main = ("all", "accuracy")

    @abstractmethod
    def server_entry(self, item_id: str, answer: str) -> dict[str, object]:
        """An item's entry in the file for the server."""

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return {}

    def metrics(self, counts: KindCounts) -> Metrics:
        return percent_by_kind(counts)

    def server_files(self, answers: Mapping[str, Sequence[Answer]]) -> Mapping[str, object]:
        entries = [self.server_entry(key, evalai_answer(_written(of_item))) for key, of_item in answers.items()]
        return {"answers.json": entries}


def people_answers(files: SuiteFiles, answers: list[Any], where: str) -> list[str]:
    """What people answered: texts, or objects with a text `answer`.

    Raises:
        UserError: If there are none, or they are something else.
    """
    found = [one if isinstance(one, str) else fields(one, where, answer=str)[0] for one in answers]
    if not found:
        raise UserError(f"{where} has no answers; expected ten; {files.fetch}")
    return found


def _written(answers: Sequence[Answer]) -> str:
    (answer,) = answers
    assert isinstance(answer, str)
    return answer
