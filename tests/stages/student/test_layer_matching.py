"""Windows of the store are used as stored; others are made from decoded maps, and the user is told."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from stages.attention.layer_selection import LayerSpan, sliding_windows
from stages.student.layer_matching import (
    ONE_TO_ONE_COSINES,
    UNMASKED_COSINES,
    UNSTORED_WINDOW_COSINES,
    MatchingConfig,
    match_layers,
)
from stages.student.training.forward import decode_windows
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.sinks import sink_keep_mask, sink_threshold
from storage.codecs.windows import window_means, window_rows
from storage.errors import UserError
from storage.targets.manifest import Manifest
from tests.storage.builders import manifest, map_targets, random_maps

LAYERS, WINDOWS = (2, 3, 4), ((2, 3), (3, 4))
CODECS = ("float16", "sqrt8", "sqrt4", "sqrt2")
WRONG = {"float16": 0.002, "sqrt8": 0.04, "sqrt4": 0.04, "sqrt2": 0.05}
"""Share of wrong mask bits that decoded maps of 40 tokens may give."""
CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "attention_codes.json"
VARIANTS = RESULTS.with_name("attention_variants.json")


def stored(name: str, num_tokens: int = 40) -> EncodedMaps:
    return map_targets(manifest(map_codec=MapCodecConfig(name=name)), num_tokens, seed=3)


def exact_windows(num_tokens: int, windows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return window_means(random_maps(len(LAYERS), num_tokens, seed=3), window_rows(LAYERS, windows))


def test_as_many_layers_as_the_stored_windows_use_the_stored_masks_without_a_note() -> None:
    matching, notes = match_layers(6, manifest(), MatchingConfig())
    assert matching.stored_masks
    assert matching.windows == WINDOWS
    assert notes == []


@pytest.mark.parametrize("name", CODECS)
def test_stored_windows_have_the_exact_masks_and_padding_has_none(name: str) -> None:
    matching, _ = match_layers(6, manifest(map_codec=MapCodecConfig(name=name)), MatchingConfig())
    found = decode_windows([stored(name), None, stored(name, 25)], matching, CPU)
    assert found.num_tokens_B.tolist() == [40, 0, 25]
    for row, n in ((0, 40), (2, 25)):
        assert torch.equal(found.keep_WBNN[:, row, :n, :n], sink_keep_mask(exact_windows(n, WINDOWS)))
    assert not found.keep_WBNN[:, 1].any()
    assert not found.maps_WBNN[:, 1].any()
    assert not found.keep_WBNN[:, 2, 25:].any()
    assert not found.maps_WBNN[:, 2, :, 25:].any()


@pytest.mark.parametrize("name", CODECS)
def test_another_number_of_layers_takes_masks_from_decoded_maps_and_says_so(name: str) -> None:
    codec = MapCodecConfig(name=name)
    matching, (note,) = match_layers(6, manifest(map_codec=codec), MatchingConfig(num_matched=1))
    assert note.startswith("1 layers are matched, but the targets hold exact sink masks for 2")
    assert f"with {name} codes was at least {UNSTORED_WINDOW_COSINES[name]}" in note
    assert "teacher.num_matched=1" in note
    found = decode_windows([stored(name)], matching, CPU)
    decoded = window_means(MapCodec(codec).decode(stored(name)), window_rows(LAYERS, (LAYERS,)))
    # But for the last two keys.
    torch.testing.assert_close(found.maps_WBNN[:, 0, :, :38], decoded[:, :, :38], rtol=1e-6, atol=1e-9)
    exact = exact_windows(40, (LAYERS,))
    threshold = sink_threshold(exact.flatten(1), 40 * 40)
    expected = (decoded <= threshold[:, None, None]).tril()
    assert torch.equal(found.keep_WBNN[:, 0, :, :38], expected[:, :, :38])
    wrong = (found.keep_WBNN[:, 0] != sink_keep_mask(exact)).float().mean()
    assert float(wrong) < WRONG[name]


@pytest.mark.parametrize(
    ("config", "sink_mask", "cosines", "section"),
    [
        (MatchingConfig(num_matched=1), True, UNSTORED_WINDOW_COSINES, "windows-that-are-not-stored"),
        (MatchingConfig(kind="one_to_one"), True, ONE_TO_ONE_COSINES, "variants-of-the-attention-loss"),
        (MatchingConfig(), False, UNMASKED_COSINES, "variants-of-the-attention-loss"),
    ],
)
def test_of_codes_by_size_the_note_has_the_figures_of_both(
    config: MatchingConfig, sink_mask: bool, cosines: dict[str, float], section: str
) -> None:
    found = manifest(map_codec=MapCodecConfig(name="auto", sqrt8_below=99))
    _, (note,) = match_layers(6, found, config, sink_mask=sink_mask)
    small = f"with sqrt8 codes (maps of fewer than 99 image tokens) {cosines['sqrt8']}"
    assert f"with sqrt4 codes was at least {cosines['sqrt4']}, {small} (docs/codecs.md#{section};" in note


def test_the_note_names_the_measured_cosines() -> None:
    codecs = json.loads(RESULTS.read_text())["synthetic"]["codecs"]
    least = {name: codecs[name]["gradient_cosine_of_unforeseen_windows"]["layers_least"] for name in CODECS}
    assert {name: math.floor(cosine * 10_000) / 10_000 for name, cosine in least.items()} == UNSTORED_WINDOW_COSINES
    variants = json.loads(VARIANTS.read_text())["synthetic"]
    for ways, noted in (
        (["one teacher layer each"], ONE_TO_ONE_COSINES),
        (["sinks left in", "sinks left in, kl"], UNMASKED_COSINES),
    ):
        least = {name: min(variants[name][way]["least"] for way in ways) for name in noted}
        assert {name: math.floor(cosine * 10_000) / 10_000 for name, cosine in least.items()} == noted


ALL_LAYERS = tuple(range(12))


def deep(windows: tuple[tuple[int, ...], ...] = sliding_windows(ALL_LAYERS, 4)) -> Manifest:
    """Of a teacher of 12 layers, all captured: 0 to 3 are early, 4 to 7 middle, 8 to 11 late."""
    return manifest(num_layers=12, layers=ALL_LAYERS, windows=windows)


@pytest.mark.parametrize(
    ("span", "student", "teacher"),
    [("early", (0, 1), (0, 3)), ("middle", (2, 3), (4, 7)), ("late", (4, 5), (8, 11)), ("all", range(6), (0, 11))],
)
def test_a_span_matches_the_same_part_of_both_decoders(
    span: LayerSpan, student: Sequence[int], teacher: tuple[int, int]
) -> None:
    matching, (note,) = match_layers(6, deep(), MatchingConfig(span=span))
    assert matching.student_layers == tuple(student)
    assert matching.windows == sliding_windows(tuple(range(teacher[0], teacher[1] + 1)), len(student))
    if span == "all":
        assert note.startswith("6 layers are matched, but the targets hold exact sink masks for 4 windows of 9")
        assert "extract with teacher.num_matched=6" in note
    else:
        assert f"of teacher layers {teacher[0]} to {teacher[1]}, but" in note
        assert f"{teacher[1]}] and teacher.num_matched=2" in note


def test_a_span_whose_windows_are_stored_uses_the_stored_masks() -> None:
    windows = (4, 5, 6), (5, 6, 7)
    found = manifest(num_layers=12, layers=(4, 5, 6, 7), windows=windows)
    matching, notes = match_layers(6, found, MatchingConfig(span="middle"))
    assert matching.windows == windows
    assert notes == []


def test_a_span_that_was_not_captured_is_refused_with_what_was() -> None:
    message = (
        r"the late layers of the teacher are 4 to 5, but the targets hold layers 2 to 4; choose another "
        r"train.matching.span, or extract with teacher.layers=\[4, 5\]"
    )
    with pytest.raises(UserError, match=message):
        match_layers(6, manifest(), MatchingConfig(span="late"))


def test_one_to_one_matching_takes_single_layers_and_says_that_their_masks_are_not_stored() -> None:
    matching, (note,) = match_layers(6, deep(), MatchingConfig(num_matched=3, kind="one_to_one"))
    assert matching.windows == ((0,), (6,), (11,))
    assert note.startswith("3 layers are matched with one teacher layer each, but the targets hold exact sink masks")
    assert f"was at least {ONE_TO_ONE_COSINES['sqrt4']}" in note
    assert "extract with teacher.num_matched=12" in note


@pytest.mark.parametrize("name", CODECS)
def test_single_layers_among_the_stored_windows_have_exact_masks(name: str) -> None:
    singles = tuple((layer,) for layer in LAYERS)
    config = manifest(map_codec=MapCodecConfig(name=name), windows=singles)
    matching, notes = match_layers(6, config, MatchingConfig(num_matched=2, kind="one_to_one"))
    assert matching.windows == ((2,), (4,))
    assert notes == []
    found = decode_windows([map_targets(config, 40, seed=3)], matching, CPU)
    assert torch.equal(found.keep_WBNN[:, 0], sink_keep_mask(exact_windows(40, ((2,), (4,)))))


@pytest.mark.parametrize("num_matched", [None, 1], ids=["stored", "not stored"])
def test_without_the_sink_mask_every_key_that_a_query_may_attend_to_is_kept(num_matched: int | None) -> None:
    matching, _ = match_layers(6, manifest(), MatchingConfig(num_matched=num_matched))
    found = decode_windows([stored("sqrt4"), None, stored("sqrt4", 25)], matching, CPU, sink_mask=False)
    masked = decode_windows([stored("sqrt4"), None, stored("sqrt4", 25)], matching, CPU)
    assert torch.equal(found.maps_WBNN, masked.maps_WBNN)
    for row, n in ((0, 40), (1, 0), (2, 25)):
        expected = torch.zeros(40, 40, dtype=torch.bool)
        expected[:n, :n] = torch.ones(n, n).tril().bool()
        assert all(torch.equal(keep, expected) for keep in found.keep_WBNN[:, row])


@pytest.mark.parametrize(("name", "noted"), [("float16", 0), ("sqrt8", 1), ("sqrt4", 1), ("sqrt2", 1)])
def test_a_stage_that_leaves_sinks_in_is_told_when_the_codes_cut_them(name: str, noted: int) -> None:
    found = manifest(map_codec=MapCodecConfig(name=name))
    _, notes = match_layers(6, found, MatchingConfig(), sink_mask=False)
    assert len(notes) == noted
    assert all(f"was at least {UNMASKED_COSINES[name]}" in note for note in notes)
    assert match_layers(6, found, MatchingConfig())[1] == []


def test_a_stages_settings_decide_its_matching() -> None:
    found = manifest(layers=(2, 3), windows=((2, 3),))
    config = MatchingConfig(kind="one_to_one", span="middle", student_layers=(5,))
    matching, _ = match_layers(6, found, config)
    assert (matching.student_layers, matching.windows) == ((5,), ((2,),))


@pytest.mark.parametrize("num_matched", [None, 1])
def test_maps_read_without_what_is_stored_of_windows_are_refused(num_matched: int | None) -> None:
    matching, _ = match_layers(6, manifest(), MatchingConfig(num_matched=num_matched))
    part = dataclasses.replace(stored("sqrt4"), windows=None)
    with pytest.raises(ValueError, match="read all captured layers"):
        decode_windows([part], matching, CPU)
