"""What a report page says, as frozen data; numbers that are only read are texts already.

Shape letters: W matched pairs of layers, Q words of an answer, N image tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TEACHER = "teacher"
"""Name of the model that the others learned from."""


@dataclass(frozen=True)
class Headline:
    """A figure that is read first, such as `65.4 %`; `note` says what it is compared with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Values of a model by step, or by layer."""

    model: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_held_out: bool = False
    """Whether the values are of samples that were held out of training."""

    @property
    def points(self) -> list[tuple[float, float]]:
        """Each x with its y."""
        return list(zip(self.x, self.y, strict=True))


@dataclass(frozen=True)
class CurvePanel:
    """Curves of several models in one chart."""

    title: str
    x_name: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Bar:
    """One model's number, with its 95 % interval."""

    model: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BarGroup:
    """One metric of several models."""

    title: str
    bars: tuple[Bar, ...]
    chance: float | None
    """What guessing gets, where that is known."""


@dataclass(frozen=True)
class SuiteSection:
    """A suite's main metric, and all of its metrics by kind."""

    title: str
    main: BarGroup | None
    by_kind: tuple[BarGroup, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Amount:
    """A bar of bytes or seconds; `text` is the amount as people read it."""

    name: str
    amount: float
    text: str


@dataclass(frozen=True)
class Amounts:
    """Bars that share a scale."""

    title: str
    bars: tuple[Amount, ...]


@dataclass(frozen=True)
class Facts:
    """A table; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class MapPanel:
    """One model's attention to the image tokens of one sample.

    Attributes:
        name: the model, and where models differ in it, as whose teacher.
        layers: names of its matched layers.
        pooled_WN: attention that each image token receives from image tokens, sinks left out.
        with_sinks_WN: the same with sinks.
        words_WQN: attention from each word of the sample to the image tokens; None where it was not computed.
    """

    name: str
    layers: tuple[str, ...]
    pooled_WN: NDArray[np.float32]
    with_sinks_WN: NDArray[np.float32]
    words_WQN: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class AnsweredQuestion:
    """A suite's item about a sample's picture, and what models answered."""

    suite: str
    question: str
    expected: str
    answers: tuple[tuple[str, str, bool | None], ...]
    """Model, its answer, and whether that was right; None where an item is not simply right or wrong."""


@dataclass(frozen=True)
class GallerySample:
    """A sample whose attention can be looked at."""

    key: str
    question: str
    answer: str
    image: Image.Image
    boxes_N4: NDArray[np.float32]
    """Left, top, right and bottom of what each image token shows, as fractions of the picture; empty for one that shows
    none of it."""
    words: tuple[str, ...]
    panels: tuple[MapPanel, ...]
    questions: tuple[AnsweredQuestion, ...] = ()


@dataclass(frozen=True)
class Page:
    """All of a report. Sections without content are left out."""

    title: str
    lead: str = ""
    models: tuple[str, ...] = ()
    """Every model that has a colour, in the order of the colours."""
    headlines: tuple[Headline, ...] = ()
    suites: tuple[SuiteSection, ...] = ()
    samples: tuple[GallerySample, ...] = ()
    similarity: CurvePanel | None = None
    losses: tuple[CurvePanel, ...] = ()
    amounts: tuple[Amounts, ...] = ()
    facts: tuple[Facts, ...] = ()
    notes: tuple[str, ...] = ()
