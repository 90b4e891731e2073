"""What a suite is: items, each with questions to the model; what an answer counts; how counts become metrics.

A suite is one file beside this one: a subclass of `Suite` with its makers' layout, prompts, parser and metric.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite_files import SuiteFiles

Protocol = Literal["likelihood", "mean_likelihood", "yes_probability", "compodistill", "generate", "yes_over_no"]
"""How a suite is put to a model.

- `likelihood`: captions are compared as answers, by the sum of their tokens' log-probabilities, the end token included.
- `mean_likelihood`: by the mean over their tokens, without the end token (VisualGPTScore).
- `yes_probability`: by P("Yes") after a question whether the picture shows the caption (VQAScore).
- `compodistill`: two captions are shown as (A) and (B) in both orders, a letter is generated (the authors' script).
- `generate`: the makers' own question, a generated answer and the makers' parser.
- `yes_over_no`: the makers' own question; the answer is yes where the first token of "Yes" is likelier than that of
  "No", or the one of two option letters that is likelier.
"""


@dataclass(frozen=True)
class Question:
    """What a model is asked once."""

    prompt: str
    pictures: tuple[SuitePicture, ...]
    candidates: tuple[str, ...] = ()
    """Answers whose log-probability is wanted; without any the model writes one."""
    first_token_only: bool = False
    """Of each candidate only its first token counts, behind those that every answer begins with."""
    max_new_tokens: int = 16
    """Tokens of a written answer at most."""


class Likelihood(NamedTuple):
    """How likely a candidate is as the answer; natural logarithms."""

    log_prob: float
    """Sum over its tokens, without the end token."""
    num_tokens: int
    end_log_prob: float
    """Of the end token behind it; 0 where the chat template writes none, or only the first token counts."""

    @property
    def total(self) -> float:
        """Log-probability of the whole answer, its end included."""
        return self.log_prob + self.end_log_prob

    @property
    def mean(self) -> float:
        """Mean over the tokens without the end."""
        return self.log_prob / self.num_tokens


Answer = str | tuple[Likelihood, ...]
"""To a question: the text that was written, or how likely each candidate is."""

Counts = Mapping[str, float]
"""What one item adds to each count of its kinds; counts that are left out are 0. `items` is added by itself."""

KindCounts = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Sums of counts by kind, then by name: `[R]`, of the items as they are and of R-1 resampled sets of them; NaN
where a set has no item of the kind."""

Metrics = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Values by kind, then by metric: `[R]` as the sums they were made of."""


@dataclass(frozen=True)
class Item:
    """The smallest part of a suite that is scored on its own, such as a pair of captions or a group of questions."""

    id: str
    """Unique in the suite."""
    kinds: tuple[str, ...]
    """The sub-scores that it counts for, such as `swap_obj`."""
    questions: tuple[Question, ...]
    expected: object
    """What the suite's scorer needs beside the answers; as JSON has it."""
    unit: str = ""
    """What is drawn as a whole when intervals are computed, such as the image of several items; "" is the item."""


class Suite(ABC):
    """A suite by the rules of its makers; it has no state.

    Attributes:
        name: as `--suite` has it.
        source: where rules and data are from, for people.
        fetch: what to put into the folder, and where its makers publish it.
        protocols: how it can be asked; the first is its makers' way.
        chance: by metric, what guessing gets, in the metric's unit.
        main: kind and metric of the number that stands for the suite.
        all_kinds: those of the whole suite; a folder that lacks some is told, for its average is another number.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    fetch: ClassVar[str]
    protocols: ClassVar[tuple[Protocol, ...]]
    chance: ClassVar[Mapping[str, float]] = {}
    main: ClassVar[tuple[str, str]]
    all_kinds: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterable[Item]:
        """The items of a folder in the makers' layout, in its order.

        Raises:
            UserError: If files are missing or have another layout; names what to fetch.
        """

    @abstractmethod
    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        """What the answers to an item's questions count, by the makers' parser."""

    def chance_of(self, kind: str, metric: str, protocol: Protocol) -> float | None:
        """What guessing gets of a metric of a kind, in the metric's unit; None where that is not known."""
        return self.chance.get(metric)

    def metrics(self, counts: KindCounts) -> Metrics:
        """The makers' metrics, in their units; by default each count in percent of a kind's items, and `average`."""
        return with_average(percent_by_kind(counts))

    def metrics_of_always_yes(self, counts: KindCounts) -> Metrics:
        """Of these, what always saying yes would get, where no other guess has a level; by default none."""
        return {}

    def server_files(self, answers: Mapping[str, Sequence[Answer]]) -> Mapping[str, object]:
        """Files for the makers' server, where it alone has the labels: by name, as JSON has them; by default none.

        Args:
            answers: By the item's id.
        """
        return {}


def percent_by_kind(counts: KindCounts) -> Metrics:
    """Every count of every kind in percent of its items."""
    return {kind: percent_of_items(sums) for kind, sums in counts.items()}


def percent_of_items(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Every count of a kind in percent of its items."""
    return {name: 100 * ratio(total, sums["items"]) for name, total in sums.items() if name != "items"}


def with_average(metrics: Metrics, kinds: Iterable[str] | None = None) -> Metrics:
    """Adds the unweighted mean over kinds, as the kind `average`, for every metric that all of them have.

    In a resampled set it is over the kinds that the set has.
    """
    chosen = list(metrics if kinds is None else kinds)
    shared = [name for name in metrics[chosen[0]] if all(name in metrics[kind] for kind in chosen)]
    return {**metrics, "average": {name: mean_of_drawn([metrics[kind][name] for kind in chosen]) for name in shared}}


def mean_of_drawn(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean of metrics `[R]` without those that are NaN, whose kind was not drawn; NaN where all are."""
    stacked = np.stack(values)
    num_drawn = (~np.isnan(stacked)).sum(0)
    found: NDArray[np.float64] = np.full(num_drawn.shape, np.nan)
    np.divide(np.nansum(stacked, axis=0), num_drawn, out=found, where=num_drawn > 0)
    return found


def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part by whole; 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole != 0)
