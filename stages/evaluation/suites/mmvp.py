"""MMVP: pairs of images that CLIP takes for alike, with one question and two options. Tong et al., 2024."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from stages.evaluation.suites.letters import mmvp_letter
from stages.evaluation.suites.suite import (
    Answer,
    Counts,
    Item,
    KindCounts,
    Metrics,
    Protocol,
    Question,
    Suite,
    percent_by_kind,
)
from stages.evaluation.suites.suite_files import SuiteFiles
from storage.errors import UserError

CORRECTED: Final = {99: "B", 100: "A", 279: "B", 280: "A"}
"""Answers that are swapped in the published table. Source: issue 1018 of lmms-eval, issue 30 of tsb0601/MMVP."""
_COLUMNS: Final = ("Question", "Options", "Correct Answer")
_OPTIONS: Final = re.compile(r"\(a\)(.+?)\(b\)(.+)", re.IGNORECASE | re.DOTALL)
_LABEL: Final = re.compile(r"\(?([ab])\b", re.IGNORECASE)
_SUFFIX: Final = "\nAnswer with the option's letter from the given choices directly."


class Mmvp(Suite):
    """Pair accuracy: images 2i-1 and 2i both answered rightly.

    `pair_accuracy` goes by the answers of the folder's table, `pair_accuracy_corrected` by those with the four that
    the published one has swapped put right; a table that is corrected already gives both alike. The makers ask
    "{question} {options}" and let GPT judge; prompt and parser here are those of lmms-eval.
    """

    name = "mmvp"
    source = "tsb0601/MMVP; prompt and parser: lmms-eval, tasks/mmvp/utils.py"
    fetch = "Questions.csv and the folder `MMVP Images` from huggingface.co/datasets/MMVP/MMVP"
    protocols = ("generate",)
    chance = {
        "accuracy": 50.0,
        "accuracy_corrected": 50.0,
        "pair_accuracy": 25.0,
        "pair_accuracy_corrected": 25.0,
    }
    main = ("all", "pair_accuracy_corrected")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        (path,) = files.need("Questions.csv")
        rows = list(files.csv(path))
        if len(rows) % 2 or not all(row.get(name) for row in rows for name in _COLUMNS):
            raise UserError(f"{path}: expected an even number of rows with {', '.join(_COLUMNS)}; {self.fetch}")
        asked = [_asked(files, f"{path}, row {number}", number, row) for number, row in enumerate(rows, 1)]
        for start in range(0, len(asked), 2):
            questions, labels = zip(*asked[start : start + 2], strict=True)
            corrected = [CORRECTED.get(start + place, label) for place, label in enumerate(labels, 1)]
            expected = {"as_published": list(labels), "corrected": corrected}
            yield Item(f"{start + 1}-{start + 2}", ("all",), questions, expected)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        assert isinstance(item.expected, dict)
        said = [mmvp_letter(answer) for answer in answers if isinstance(answer, str)]
        counts: dict[str, float] = {}
        for name, ending in (("as_published", ""), ("corrected", "_corrected")):
            right = [one == label for one, label in zip(said, item.expected[name], strict=True)]
            counts |= {f"accuracy{ending}": sum(right) / 2, f"pair_accuracy{ending}": float(all(right))}
        return counts

    def metrics(self, counts: KindCounts) -> Metrics:
        return percent_by_kind(counts)


def _asked(files: SuiteFiles, where: str, number: int, row: dict[str, str]) -> tuple[Question, str]:
    """The question of the image with this number, and the letter of its answer."""
    options, label = _OPTIONS.match(row["Options"].strip()), _LABEL.match(row["Correct Answer"].strip())
    if options is None or label is None or row.get("Index", str(number)).strip() != str(number):
        found = {name: row.get(name) for name in ("Index", "Options", "Correct Answer")}
        raise UserError(f"{where}: found {found}; expected that number, (a) ... (b) ..., (a) or (b)")
    listed = "".join(f"\n{letter}. {option.strip()}" for letter, option in zip("AB", options.groups(), strict=True))
    return Question(row["Question"] + listed + _SUFFIX, (files.picture(f"MMVP Images/{number}.jpg"),)), label[1].upper()
