"""Which student layers learn from which windows of a target store."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import Field

from stages.attention.layer_selection import (
    LayerSpan,
    Matching,
    default_num_matched,
    single_layers,
    sliding_windows,
    span_layers,
    student_layers,
    with_maps,
)
from storage.codecs.codec_settings import MapCodecConfig, MapCodecName
from storage.errors import UserError
from storage.strict_model import StrictModel
from storage.targets.manifest import Fingerprint, Manifest

UNSTORED_WINDOW_COSINES = {"float16": 0.9999, "sqrt8": 0.9998, "sqrt4": 0.9562, "sqrt2": 0.9348}
"""Least cosine of the gradient with windows that are not stored, in `benchmarks/results/attention_codes.json`."""
ONE_TO_ONE_COSINES = {"float16": 0.9999, "sqrt8": 0.9992, "sqrt4": 0.9985, "sqrt2": 0.9492}
"""The same of one teacher layer for each student layer, in `benchmarks/results/attention_variants.json`."""
UNMASKED_COSINES = {"sqrt8": 0.9964, "sqrt4": 0.9804, "sqrt2": 0.9641}
"""The same of stored windows with sinks left in, which codes cut at the cap; least of cosine and KL, same file. All
are of large maps."""

_SOFTMAX = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Types of layers, as configs name them, that have attention maps."""

WITHOUT_MAPS = (
    "match others (train.matching.student_layers), choose another decoder, or set attention_weight to 0 in the stages "
    "that have it"
)
"""What to do about student layers that give no attention maps."""


class MatchingConfig(StrictModel):
    """Which student layers learn from which teacher layers."""

    student_layers: tuple[int, ...] | None = None
    """Student layers that are matched, counted from 0; None takes the first `num_matched` ones of the span."""
    num_matched: int | None = Field(default=None, ge=1)
    """How many student layers are matched; None follows the target store, fewer for a shallow student."""
    kind: Matching = "group"
    """Whether a matched student layer learns from the mean of a window of teacher layers (`group`), or from one of them
    (`one_to_one`)."""
    span: LayerSpan | None = None
    """Part of both decoders that is matched: their early, middle or late layers, or all; teacher layers must be in the
    targets. None takes all that the targets hold, for the student's middle third."""


@dataclass(frozen=True)
class LayerMatching:
    """Which student layer learns from which teacher layers, and how the stored maps are coded.

    Attributes:
        student_layers: matched layers of the student, counted from 0.
        captured_layers: the store's teacher layers, in stored order.
        windows: teacher layers of each student layer.
        stored_windows: windows for which the store holds exact sink masks and means of keys.
        codec: how the store's maps are coded.
    """

    student_layers: tuple[int, ...]
    captured_layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    stored_windows: tuple[tuple[int, ...], ...]
    codec: MapCodecConfig

    @property
    def stored_masks(self) -> bool:
        """Whether the store holds exact sink masks and means of keys for all of `windows`."""
        return set(self.windows) <= set(self.stored_windows)


def match_layers(
    student_depth: int,
    manifest: Manifest,
    config: MatchingConfig,
    *,
    sink_mask: bool = True,
    able: Collection[int] | None = None,
) -> tuple[LayerMatching, list[str]]:
    """Matching of a student of that many decoder layers with a store's captured layers, and notes for the user.

    Where `config` has no number of layers, it is the store's where that holds just the span, else what
    `default_num_matched` says; for the span `all` it is the number of layers of the shallower model. Only the notes
    depend on `sink_mask`: whether attention sinks are left out. `able` are the student's layers with attention maps,
    None where they are not known; where there are none, layers are chosen as if all had some.

    Raises:
        UserError: If layers are asked for that the student lacks, or that were not captured.
    """
    fingerprint, layers, span = manifest.fingerprint, config.student_layers, config.span
    captured, able = fingerprint.layers, able or None
    if span is not None:
        captured = with_maps(span_layers(manifest.num_layers, span), _teachers_layers(fingerprint))
        if not set(captured) <= set(fingerprint.layers):
            raise UserError(
                f"the {span} layers of the teacher are {captured[0]} to {captured[-1]}, but the targets hold layers "
                f"{fingerprint.layers[0]} to {fingerprint.layers[-1]}; choose another train.matching.span, or extract "
                f"with teacher.layers=[{', '.join(map(str, captured))}]"
            )
    if layers is None:
        num_matched = config.num_matched or _default_num_matched(student_depth, fingerprint, captured, span, able)
        layers = student_layers(student_depth, num_matched, span or "middle", able)
    if not layers or min(layers) < 0 or max(layers) >= student_depth:
        raise UserError(
            f"student layers {list(layers)} were asked for, but the decoder has layers 0 to {student_depth - 1}"
        )
    windows = (sliding_windows if config.kind == "group" else single_layers)(captured, len(layers))
    found = LayerMatching(layers, fingerprint.layers, windows, fingerprint.windows, fingerprint.map_codec)
    notes = [] if found.stored_masks else [_note(found, config.kind, captured)]
    cut = [name for name in _codecs(found.codec) if name in UNMASKED_COSINES]
    if not sink_mask and cut:
        notes.append(
            f"attention sinks take part (attention_sink_mask is off), but {' and '.join(cut)} codes cut what is far "
            f"above the sink threshold: {_measured(UNMASKED_COSINES, found.codec)} "
            "(docs/codecs.md#variants-of-the-attention-loss; less with small maps); for an exact one extract with "
            "teacher.map_codec=float16"
        )
    return found, notes


def _teachers_layers(fingerprint: Fingerprint) -> set[int] | None:
    """Layers with softmax attention, where the teacher's config says of which type each is."""
    text = fingerprint.teacher_config.get("text_config")
    types = text.get("layer_types") if isinstance(text, dict) else None
    return {number for number, kind in enumerate(types) if kind in _SOFTMAX} if types else None


def _default_num_matched(
    student_depth: int,
    fingerprint: Fingerprint,
    captured: tuple[int, ...],
    span: LayerSpan | None,
    able: Collection[int] | None,
) -> int:
    if span is None:
        return min(len(fingerprint.windows), default_num_matched(student_depth, able))
    shallower = min(len(captured), len(with_maps(span_layers(student_depth, span), able)))
    if span == "all":
        return shallower
    most = len(fingerprint.windows) if captured == fingerprint.layers else default_num_matched(student_depth, able)
    return min(shallower, most)


def _note(found: LayerMatching, matching: Matching, captured: tuple[int, ...]) -> str:
    """What masks of windows that are not stored are made of, and which extraction would store them."""
    count = len(found.windows)
    cosines = ONE_TO_ONE_COSINES if matching == "one_to_one" else UNSTORED_WINDOW_COSINES
    section = "variants-of-the-attention-loss" if matching == "one_to_one" else "windows-that-are-not-stored"
    how = " with one teacher layer each" if matching == "one_to_one" else ""
    part = "," if captured == found.captured_layers else f", of teacher layers {captured[0]} to {captured[-1]},"
    remedy = f"teacher.num_matched={len(captured) if matching == 'one_to_one' else count}"
    if captured != found.captured_layers:
        remedy = f"teacher.layers=[{', '.join(map(str, captured))}] and {remedy}"
    elif matching == "group":
        remedy = f"{remedy}; or match {len(found.stored_windows)} layers"
    return (
        f"{count} layers are matched{how}{part} but the targets hold exact sink masks for {len(found.stored_windows)} "
        f"windows of {len(found.stored_windows[0])}: masks are made from decoded maps; "
        f"{_measured(cosines, found.codec)} (docs/codecs.md#{section}; less with small maps); "
        f"for exact ones extract with {remedy}"
    )


def _measured(cosines: Mapping[str, float], codec: MapCodecConfig) -> str:
    """What was measured with the codes that the maps may have."""
    large, *small = _codecs(codec)
    found = f"with {large} codes was at least {cosines[large]}"
    for name in small:
        found = f"{found}, with {name} codes (maps of fewer than {codec.sqrt8_below} image tokens) {cosines[name]}"
    return f"the cosine between the attention gradient and the exact one, measured on large maps, {found}"


def _codecs(codec: MapCodecConfig) -> list[MapCodecName]:
    """The codecs that maps may have, that of the largest first."""
    return list(dict.fromkeys(codec.of_size(num_tokens).name for num_tokens in (2**24, 0)))
