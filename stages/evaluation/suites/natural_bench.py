"""NaturalBench: two questions of two images, each answered otherwise by the other image. Li et al., 2024."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

from stages.evaluation.suites.letters import first_word_of
from stages.evaluation.suites.pictures import SuitePicture, picture_of_cell
from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, percent_by_kind
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.yes_no import YES_NO_PROTOCOLS, first_is_likelier, two_way_question
from storage.errors import UserError

_SUFFIXES: Final = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}
_OPTIONS: Final = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}
_FIRST_IS_RIGHT: Final = (True, False, False, True)
"""Of question 0 with image 0 and image 1, then of question 1 with both, whether the first option is right."""

_Asked = tuple[str, SuitePicture]


class NaturalBench(Suite):
    """Group accuracy: all four answers right. Also by question (right with both images), by image (both questions
    right) and of single answers.

    Without a whole word yes or no (A or B) an answer is wrong. `yes_share` is of all answers that of Yes and A. The
    makers' example has no blank before the suffix; lmms-eval, whose numbers are published, has.
    """

    name = "naturalbench"
    source = "Baiqi-Li/NaturalBench, example.py; prompt as in lmms-eval, tasks/naturalbench/utils.py"
    fetch = (
        "the Parquet files of huggingface.co/datasets/BaiqiL/NaturalBench (a row a group), or of "
        "BaiqiL/naturalbench_lmms-eval (a row a question), or one of these data sets saved"
    )
    protocols = YES_NO_PROTOCOLS
    chance = {"accuracy": 50.0, "question_accuracy": 25.0, "image_accuracy": 25.0, "group_accuracy": 6.25}
    main = ("all", "group_accuracy")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for number, (where, kind, asked) in enumerate(_groups(_rows(files))):
            if kind not in _SUFFIXES:
                raise UserError(f"{where}: question type {kind!r:.100}; expected {' or '.join(_SUFFIXES)}")
            questions = tuple(
                two_way_question(text + _SUFFIXES[kind], picture, protocol, _OPTIONS[kind]) for text, picture in asked
            )
            yield Item(str(number), ("all", kind), questions, list(_FIRST_IS_RIGHT))

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        yes, no = _OPTIONS[item.kinds[1]]
        said = [first_word_of(one, yes, no) if isinstance(one, str) else first_is_likelier(one) for one in answers]
        right = [found is expected for found, expected in zip(said, _FIRST_IS_RIGHT, strict=True)]
        return {
            "group_accuracy": all(right),
            "question_accuracy": ((right[0] and right[1]) + (right[2] and right[3])) / 2,
            "image_accuracy": ((right[0] and right[2]) + (right[1] and right[3])) / 2,
            "accuracy": sum(right) / 4,
            "yes_share": said.count(True) / 4,
        }

    def metrics(self, counts: KindCounts) -> Metrics:
        return percent_by_kind(counts)


def _rows(files: SuiteFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row."""
    for path in files.tables() or files.find("data/*.parquet", "*.parquet"):
        for number, row in enumerate(files.rows(path)):
            yield f"{path}, row {number}", row


def _groups(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, str, list[_Asked]]]:
    """Where each group begins, its type and its four questions."""
    for where, row in rows:
        if "Question_0" in row:
            texts = fields(row, where, Question_0=str, Question_1=str)
            pictures = [picture_of_cell(f"{where}, {name}", row.get(name)) for name in ("Image_0", "Image_1")]
            kind = row.get("Question_Type", row.get("Question Type"))
            yield where, str(kind), [(text, picture) for text in texts for picture in pictures]
            continue
        four = [(where, row), *islice(rows, 3)]
        if len(four) != 4:
            raise UserError(f"{where}: the group has {len(four)} rows of questions; expected four")
        asked = []
        for at, one in four:
            (text,) = fields(one, at, Question=str)
            asked.append((text, picture_of_cell(f"{at}, Image", one.get("Image"))))
        yield where, str(row.get("Question_Type")), asked
