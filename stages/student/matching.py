"""Which student layers learn from which windows of a target store."""

from dataclasses import dataclass

from stages.layers import default_num_matched, sliding_windows, student_layers
from storage.codecs.maps import MapCodecConfig
from storage.errors import UserError
from storage.manifest import Fingerprint

UNFORESEEN_COSINES = {"float16": 0.9999, "sqrt8": 0.9998, "sqrt4": 0.9562, "sqrt2": 0.9348}
"""Least cosine of the gradient with windows that were not foreseen, in `benchmarks/results/attention_codes.json`."""


@dataclass(frozen=True)
class LayerMatching:
    """Which student layer learns from which teacher layers, and how the stored maps are coded.

    Attributes:
        student_layers: matched layers of the student, counted from 0.
        captured_layers: the store's teacher layers, in stored order.
        windows: teacher layers of each student layer.
        stored_masks: whether the store's exact sink masks and means of keys are those of `windows`.
        codec: how the store's maps are coded.
    """

    student_layers: tuple[int, ...]
    captured_layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    stored_masks: bool
    codec: MapCodecConfig


def match_layers(
    student_depth: int,
    fingerprint: Fingerprint,
    layers: tuple[int, ...] | None = None,
    num_matched: int | None = None,
) -> tuple[LayerMatching, list[str]]:
    """Group matching of a student with a store's captured layers.

    Args:
        student_depth: decoder layers of the student.
        fingerprint: of the target store.
        layers: matched student layers; None takes those of the middle third.
        num_matched: how many, when `layers` is None; None follows the store, fewer for a shallow student.

    Returns:
        The matching, and notes for the user.

    Raises:
        UserError: layers the student does not have, or more than were captured.
    """
    if layers is None:
        wanted = num_matched or min(len(fingerprint.windows), default_num_matched(student_depth))
        layers = student_layers(student_depth, wanted)
    if not layers or min(layers) < 0 or max(layers) >= student_depth:
        raise UserError(
            f"student layers {list(layers)} were asked for, but the decoder has layers 0 to {student_depth - 1}"
        )
    windows = sliding_windows(fingerprint.layers, len(layers))
    stored_masks = windows == fingerprint.windows
    notes = []
    if not stored_masks:
        name = fingerprint.map_codec.name
        notes.append(
            f"{len(layers)} layers are matched, but the targets hold exact sink masks for {len(fingerprint.windows)}: "
            f"masks are made from decoded maps; the cosine between the attention gradient and the exact one, measured "
            f"on large maps, with {name} codes was at least {UNFORESEEN_COSINES[name]} (docs/method.md; less with "
            f"small maps); match {len(fingerprint.windows)} layers, or extract with teacher.num_matched={len(layers)}"
        )
    return LayerMatching(layers, fingerprint.layers, windows, stored_masks, fingerprint.map_codec), notes
