"""TextVQA: questions about text in pictures, each answered by ten people; with words read by OCR or without. Singh et
al., 2019.
"""

from collections.abc import Iterator
from typing import Any, Final

from stages.evaluation.suites.short_answers import ShortAnswers, people_answers
from stages.evaluation.suites.suite import Item, Protocol, Question
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.vqa_answers import LLAVA_TOKENS, SHORT_ANSWER, evalai_accuracy
from storage.errors import UserError

_ANSWERS: Final = "TextVQA_0.5.1_val.json"
_WITH_OCR: Final = "llava_textvqa_val_v051_ocr.jsonl"


class TextVqa(ShortAnswers):
    """Soft accuracy; the model is not told what OCR reads, as in lmms-eval. LLaVA's numbers are of `textvqa-ocr`."""

    name = "textvqa"
    source = "haotian-liu/LLaVA, llava/eval/eval_textvqa.py and m4c_evaluator.py"
    fetch = f"{_ANSWERS} and train_images/ of train_val_images.zip from textvqa.org/dataset"

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for position, (image, text, given) in enumerate(_annotations(files)):
            yield _item(files, position, image, text + SHORT_ANSWER, given)

    def accuracy(self, answer: str, expected: Any) -> float:
        return evalai_accuracy(answer, expected)


class TextVqaOcr(TextVqa):
    """Soft accuracy; each question comes with the words that OCR reads, as LLaVA's question file has it.

    A question finds its answers by its image and its text in small letters.
    """

    name = "textvqa-ocr"
    fetch = f"{_WITH_OCR} of LLaVA's eval.zip (github.com/haotian-liu/LLaVA, its page on evaluation); {TextVqa.fetch}"

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        path, _ = files.need(_WITH_OCR, _ANSWERS)
        answers = {(image, text.lower()): given for image, text, given in _annotations(files)}
        for position, record in enumerate(files.rows(path)):
            where = f"{path}, question {position}"
            image, prompt = fields(record, where, question_id=str, text=str)
            key = (image, _question_in(prompt).lower())
            if key not in answers:
                raise UserError(f"{where}: {_ANSWERS} has no answers to {key[1]!r} of image {image}; {self.fetch}")
            yield _item(files, position, image, prompt, answers[key], LLAVA_TOKENS)


def _annotations(files: SuiteFiles) -> Iterator[tuple[str, str, list[str]]]:
    """Image, question and the people's answers."""
    (path,) = files.need(_ANSWERS)
    for position, record in enumerate(files.records(path, key="data")):
        where = f"{path}, question {position}"
        image, text, given = fields(record, where, image_id=str, question=str, answers=list)
        yield image, text, people_answers(files, given, where)


def _item(
    files: SuiteFiles, position: int, image: str, prompt: str, given: list[str], max_new_tokens: int = 16
) -> Item:
    question = Question(prompt, (files.picture(f"train_images/{image}.jpg"),), max_new_tokens=max_new_tokens)
    return Item(f"{image}/{position}", ("all",), (question,), given, unit=image)


def _question_in(prompt: str) -> str:
    """The line of a prompt that is the question: the first, or the second behind the words of OCR."""
    first, *others = prompt.split("\n")
    return others[0] if others and first.startswith("Reference OCR token:") else first
