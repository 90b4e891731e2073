"""Sums up one model's attention over samples, layer by layer."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from stages.evaluation.attention.measures import (
    Estimate,
    map_differences,
    mean_estimate,
    object_auc,
    pair_estimate,
    row_cosine,
)
from stages.evaluation.attention.observe import Observed
from storage.strict_model import StrictModel

PAIR_IMAGES: Final = 32
"""Different images whose maps are compared with each other at most."""

Kinds = tuple[Tensor, Tensor]
"""Which image tokens show an object, and which background."""


class LayerMeasures(StrictModel):
    """What one model's attention says, for each layer or window of layers; None where no sample gives the number."""

    layers: tuple[tuple[int, ...], ...]
    between_images: tuple[Estimate | None, ...]
    """1 - cosine of the sink-free maps of two images, mean over pairs; 0 is the same map for all images."""
    objects: tuple[Estimate | None, ...] = ()
    """AUC of object tokens against background tokens by the attention that they receive from image tokens."""
    text_objects: tuple[Estimate | None, ...] = ()
    """The same by the attention from the chosen rows of text."""
    text_share: tuple[Estimate | None, ...] = ()
    """Part of the attention of the chosen rows of text that goes to the image."""
    text_similarity: tuple[Estimate | None, ...] = ()
    """Cosine of these rows with the teacher's."""


class LayerTally:
    """Takes samples of one model one after the other; holds their numbers, and the maps of a few images."""

    def __init__(self, windows: Sequence[Sequence[int]], *, with_objects: bool, with_text: bool) -> None:
        self.windows = tuple(map(tuple, windows))
        self._with_objects, self._with_text = with_objects, with_text
        self._images: list[str] = []
        self._values: dict[str, list[list[float]]] = {}
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}
        self.num_with_text = 0

    def add(
        self, image: str, seen: Observed, kinds: Kinds | None = None, teacher_text_WN: Tensor | None = None
    ) -> None:
        """A sample about an image with this digest; `teacher_text_WN` are the teacher's rows for the same windows."""
        self._images.append(image)
        self.num_with_text += seen.text_WN is not None
        nan = [float("nan")] * len(self.windows)
        pooled = texts = nan
        if kinds is not None:
            is_object_N, is_background_N = kinds
            # A token that is a sink for every query has no attention that could be compared.
            pairs = zip(seen.received_WN, seen.keep_WNN.any(-2), strict=True)
            pooled = [object_auc(row, is_object_N & known, is_background_N & known) for row, known in pairs]
            if seen.text_WN is not None:
                texts = [object_auc(row, is_object_N, is_background_N) for row in seen.text_WN]
        self._append("objects", pooled)
        self._append("text_objects", texts)
        self._append("text_share", nan if seen.text_WN is None else seen.text_WN.sum(-1).tolist())
        both = (
            None if seen.text_WN is None or teacher_text_WN is None else zip(seen.text_WN, teacher_text_WN, strict=True)
        )
        self._append("text_similarity", nan if both is None else [row_cosine(own, other) for own, other in both])
        if len(self._maps) < PAIR_IMAGES:
            self._maps.setdefault(image, (seen.maps_WNN, seen.keep_WNN))

    def result(self, *, with_similarity: bool = False) -> LayerMeasures:
        """All numbers, with intervals over images."""
        return LayerMeasures(
            layers=self.windows,
            between_images=self._between_images(),
            objects=self._means("objects") if self._with_objects else (),
            text_objects=self._means("text_objects") if self._with_objects and self._with_text else (),
            text_share=self._means("text_share") if self._with_text else (),
            text_similarity=self._means("text_similarity") if with_similarity else (),
        )

    def _append(self, name: str, values: Sequence[float]) -> None:
        self._values.setdefault(name, []).append(list(values))

    def _means(self, name: str) -> tuple[Estimate | None, ...]:
        columns = list(zip(*self._values.get(name, []), strict=True)) or [()] * len(self.windows)
        return tuple(mean_estimate(column, self._images if column else []) for column in columns)

    def _between_images(self) -> tuple[Estimate | None, ...]:
        """Over the images of the commonest number of tokens: maps of different sizes cannot be compared."""
        sizes = Counter(maps.shape[-1] for maps, _ in self._maps.values())
        if not sizes:
            return (None,) * len(self.windows)
        size = sizes.most_common(1)[0][0]
        of_size = [pair for pair in self._maps.values() if pair[0].shape[-1] == size]
        return tuple(
            pair_estimate(map_differences([maps[w] for maps, _ in of_size], [keep[w] for _, keep in of_size]))
            for w in range(len(self.windows))
        )
