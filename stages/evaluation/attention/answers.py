"""Which items of suites a student answered right, and the pictures that link them to stored samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stages.evaluation.answered_items import read_items
from stages.evaluation.attention.measures import Estimate, correlation, mean_estimate
from stages.evaluation.result import SuiteRun
from stages.evaluation.suites.registry import SUITES
from storage.errors import UserError
from storage.strict_model import StrictModel


class AnsweredPicture(NamedTuple):
    """An item about one picture."""

    sha256: str
    """Of the picture's file."""
    right: float
    """1 for right, 0 for wrong; some suites have numbers between."""


class AnswersSplit(StrictModel):
    """Similarity of a student's attention to the teacher's, by whether its answers about the same pictures are right.

    Similarity of a picture is the mean over its samples and over the matched layers.
    """

    suite: str
    protocol: str
    """How the answers were got."""
    num_items: int
    num_without_sample: int
    """Items whose picture is in no compared sample."""
    num_other: int
    """Items about no picture, or about several."""
    right: Estimate | None
    """Similarity over items that were answered right, at least by half."""
    wrong: Estimate | None
    correlation: Estimate | None
    """Point-biserial, of similarity with right."""
    by_layer: tuple[Estimate | None, ...]
    """The correlation for each matched layer."""


def answered_pictures(folder: Path, suite: str) -> tuple[list[AnsweredPicture], int]:
    """The items about one picture, and how many there are about none or several.

    Raises:
        UserError: If the answers hold no digests of pictures, or do not say what is right.
    """
    found, num_other = dict[str, AnsweredPicture](), set[str]()
    for item in read_items(folder).values():
        digests = {digest for asked in item.questions for digest in asked.pictures}
        if len(digests) == 1:
            found[item.id] = AnsweredPicture(digests.pop(), how_right(item.scored.counts, suite))
        else:
            num_other.add(item.id)
    return list(found.values()), len(num_other)


def how_right(counts: Mapping[str, float], suite: str) -> float:
    """Whether an item was answered right, from 0 to 1: its count of the suite's main metric, or of its parts.

    Raises:
        UserError: If the suite's counts do not say it.
    """
    for name in (SUITES[suite].main[1], "accuracy", "question_accuracy"):
        if 0 <= counts.get(name, -1) <= 1:
            return counts[name]
    if 0 <= (hits := counts.get("true_positives", -1) + counts.get("true_negatives", 0)) <= 1:
        return hits
    raise UserError(
        f"items of {suite} count {sorted(counts)}, which does not say whether one is right; take another suite"
    )


def split_by_answers(
    folder: Path, run: SuiteRun, similarities: Mapping[str, Sequence[Sequence[float]]]
) -> AnswersSplit:
    """Similarity by right and wrong answers.

    Args:
        folder: Of the suite's answers.
        run: Whose answers they are.
        similarities: By sha256 of a picture, of each of its samples the similarity of each matched layer.
    """
    items, num_other = answered_pictures(folder, run.suite)
    linked = [item for item in items if item.sha256 in similarities]
    by_layer = {sha: [sum(c) / len(c) for c in zip(*rows, strict=True)] for sha, rows in similarities.items()}
    means = [sum(by_layer[item.sha256]) / len(by_layer[item.sha256]) for item in linked]
    rights, images = [item.right for item in linked], [item.sha256 for item in linked]
    parts = {
        wanted: [
            (mean, image) for mean, right, image in zip(means, rights, images, strict=True) if (right >= 0.5) == wanted
        ]
        for wanted in (True, False)
    }
    layers = zip(*(by_layer[item.sha256] for item in linked), strict=True)
    return AnswersSplit(
        suite=run.suite,
        protocol=run.protocol,
        num_items=len(linked),
        num_without_sample=len(items) - len(linked),
        num_other=num_other,
        right=mean_estimate([mean for mean, _ in parts[True]], [image for _, image in parts[True]]),
        wrong=mean_estimate([mean for mean, _ in parts[False]], [image for _, image in parts[False]]),
        correlation=correlation(means, rights, images),
        by_layer=tuple(correlation(values, rights, images) for values in layers),
    )
