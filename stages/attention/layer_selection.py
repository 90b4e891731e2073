"""Which decoder layers take part in attention transfer, and which teacher layers each student layer is matched with.

Layer numbers count from 0. Source: docs/method.md#layer-matching and docs/method.md#layer-spans.
"""

from collections.abc import Collection
from typing import Literal

from storage.errors import UserError

LayerSpan = Literal["early", "middle", "late", "all"]
Matching = Literal["group", "one_to_one"]

MATCHED_LAYERS = 7  # S of the published models
_PUBLISHED_SPANS = {24: (8, 8), 28: (9, 9), 32: (11, 9), 40: (13, 11)}  # depth -> (first layer, number of layers)


def visual_understanding_layers(num_layers: int) -> range:
    """The middle third of a decoder: the published span where there is one, else first = round(depth / 3).

    >>> list(visual_understanding_layers(8))
    [3, 4, 5]
    """
    if num_layers < 1:
        raise UserError(f"a decoder of {num_layers} layers has no middle third; expected at least 1 layer")
    first, count = _PUBLISHED_SPANS.get(num_layers, (round(num_layers / 3), max(1, round(num_layers / 3))))
    first = min(first, num_layers - 1)
    return range(first, min(first + count, num_layers))


def span_layers(num_layers: int, span: LayerSpan) -> range:
    """Layers of a decoder: its visual understanding layers in the middle, those before, those after, or all.

    >>> [list(span_layers(8, span)) for span in ("early", "middle", "late")]
    [[0, 1, 2], [3, 4, 5], [6, 7]]

    Raises:
        UserError: If there are none.
    """
    middle = visual_understanding_layers(num_layers)
    ends = {"early": (0, middle.start), "middle": (middle.start, middle.stop), "late": (middle.stop, num_layers)}
    layers = range(*ends.get(span, (0, num_layers)))
    if not layers:
        raise UserError(f"a decoder of {num_layers} layers has no {span} layers; choose middle or all")
    return layers


def with_maps(layers: range, able: Collection[int] | None) -> tuple[int, ...]:
    """Those of `layers` that are among `able`, the decoder's layers with attention maps; all if that is None.

    >>> with_maps(range(8, 16), {3, 7, 11, 15, 19, 23})
    (11, 15)
    """
    return tuple(layer for layer in layers if able is None or layer in able)


def default_num_matched(num_layers: int, able: Collection[int] | None = None) -> int:
    """S: 7, or as many as the decoder's middle third holds with attention maps, but at least 1."""
    return min(MATCHED_LAYERS, max(1, len(with_maps(visual_understanding_layers(num_layers), able))))


def student_layers(
    num_layers: int, num_matched: int, span: LayerSpan = "middle", able: Collection[int] | None = None
) -> tuple[int, ...]:
    """The student's S layers: from the first layer of the span on, moved down if they would not fit.

    `able` are its layers with attention maps, None for all: the others are passed over.
    """
    layers = with_maps(range(num_layers), able)
    if num_matched > len(layers):
        of_what = "layers" if len(layers) == num_layers else "layers with attention maps"
        raise UserError(f"the student has {len(layers)} {of_what} but {num_matched} are to be matched; set fewer")
    start = span_layers(num_layers, span).start
    first = min(sum(layer < start for layer in layers), len(layers) - num_matched)
    return layers[first : first + num_matched]


def sliding_windows(captured: tuple[int, ...], num_matched: int) -> tuple[tuple[int, ...], ...]:
    """Group matching: S windows of g = T - S + 1 consecutive captured layers, the i-th starting at the i-th layer.

    >>> sliding_windows((3, 4, 5), 2)
    ((3, 4), (4, 5))
    """
    _check_enough(captured, num_matched)
    width = len(captured) - num_matched + 1
    return tuple(captured[i : i + width] for i in range(num_matched))


def single_layers(captured: tuple[int, ...], num_matched: int) -> tuple[tuple[int, ...], ...]:
    """One-to-one matching: S windows of one layer, evenly spaced from the first captured layer to the last.

    One alone is the middle one.

    >>> single_layers((3, 4, 5, 6, 7, 8), 3)
    ((3,), (6,), (8,))
    """
    _check_enough(captured, num_matched)
    if num_matched == 1:
        return ((captured[(len(captured) - 1) // 2],),)
    last, steps = len(captured) - 1, num_matched - 1
    # Halves are rounded up, in whole numbers.
    return tuple((captured[(2 * i * last + steps) // (2 * steps)],) for i in range(num_matched))


def _check_enough(captured: tuple[int, ...], num_matched: int) -> None:
    if not 1 <= num_matched <= len(captured):
        raise UserError(
            f"{num_matched} matched layers need at least as many captured teacher layers, found {len(captured)}: "
            f"{list(captured)}"
        )
