"""Windows of the store are used as stored; others are made from decoded maps, and the user is told."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from stages.layers import window_means
from stages.student.batches import decode_windows
from stages.student.matching import UNFORESEEN_COSINES, match_layers
from storage.codecs import MapCodecConfig, decode_maps, sink_keep_mask
from storage.codecs.sinks import sink_threshold
from storage.records import MapTargets
from tests.storage.builders import fingerprint, manifest, map_targets, random_maps

LAYERS, WINDOWS = (2, 3, 4), ((2, 3), (3, 4))
CODECS = ("float16", "sqrt8", "sqrt4", "sqrt2")
WRONG = {"float16": 0.002, "sqrt8": 0.04, "sqrt4": 0.04, "sqrt2": 0.05}
"""Share of wrong mask bits that decoded maps of 40 tokens may give."""
CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "attention_codes.json"


def stored(name: str, num_tokens: int = 40) -> MapTargets:
    return map_targets(manifest(map_codec=MapCodecConfig(name=name)), num_tokens, seed=3)


def exact_windows(num_tokens: int, windows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return window_means(random_maps(len(LAYERS), num_tokens, seed=3), LAYERS, windows)


def test_as_many_layers_as_the_store_foresaw_use_its_masks_without_a_note() -> None:
    matching, notes = match_layers(6, fingerprint())
    assert matching.stored_masks
    assert matching.windows == WINDOWS
    assert notes == []


@pytest.mark.parametrize("name", CODECS)
def test_stored_windows_have_the_exact_masks_and_padding_has_none(name: str) -> None:
    matching, _ = match_layers(6, fingerprint(map_codec=MapCodecConfig(name=name)))
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
    matching, (note,) = match_layers(6, fingerprint(map_codec=codec), num_matched=1)
    assert note.startswith("1 layers are matched, but the targets hold exact sink masks for 2")
    assert f"with {name} codes was at least {UNFORESEEN_COSINES[name]}" in note
    assert "teacher.num_matched=1" in note
    found = decode_windows([stored(name)], matching, CPU)
    decoded = window_means(decode_maps(codec, stored(name).maps, 40), LAYERS, (LAYERS,))
    # But for the last two keys.
    torch.testing.assert_close(found.maps_WBNN[:, 0, :, :38], decoded[:, :, :38], rtol=1e-6, atol=1e-9)
    exact = exact_windows(40, (LAYERS,))
    threshold = sink_threshold(exact.flatten(1), 40 * 40)
    expected = (decoded <= threshold[:, None, None]).tril()
    assert torch.equal(found.keep_WBNN[:, 0, :, :38], expected[:, :, :38])
    wrong = (found.keep_WBNN[:, 0] != sink_keep_mask(exact)).float().mean()
    assert float(wrong) < WRONG[name]


def test_the_note_names_the_measured_cosines() -> None:
    codecs = json.loads(RESULTS.read_text())["synthetic"]["codecs"]
    least = {name: codecs[name]["gradient_cosine_of_unforeseen_windows"]["layers_least"] for name in CODECS}
    assert {name: math.floor(cosine * 10_000) / 10_000 for name, cosine in least.items()} == UNFORESEEN_COSINES


@pytest.mark.parametrize("num_matched", [None, 1])
def test_maps_read_without_what_is_stored_of_windows_are_refused(num_matched: int | None) -> None:
    matching, _ = match_layers(6, fingerprint(), num_matched=num_matched)
    part = dataclasses.replace(stored("sqrt4"), windows=None)
    with pytest.raises(ValueError, match="read all captured layers"):
        decode_windows([part], matching, CPU)
