"""Codecs against float64 and by round trip."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig, num_entries
from storage.codecs.map_entries import code_dtype
from storage.codecs.sinks import sink_keep_mask
from storage.codecs.triangle import pack_entries, unpack_entries
from tests.storage.builders import random_maps

NAMES = ("float16", "sqrt8", "sqrt4", "sqrt2")
CODECS = [MapCodecConfig(name=name, causal=causal) for name in NAMES for causal in (True, False)]
LARGEST_ERROR = {"sqrt8": 0.00393, "sqrt4": 0.0678, "sqrt2": 0.3612}
"""In caps, as the docstring says."""


def test_the_triangle_is_stored_row_by_row():
    square = torch.arange(9).view(3, 3)
    assert pack_entries(square, causal=True).tolist() == [0, 3, 4, 6, 7, 8]
    assert unpack_entries(torch.tensor([1, 2, 3, 4, 5, 6]), 3, causal=True).tolist() == [
        [1, 0, 0],
        [2, 3, 0],
        [4, 5, 6],
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.booleans(), st.integers(0, 3))
def test_packing_entries_round_trips(num_tokens, causal, num_leading):
    maps = random_maps(max(1, num_leading), num_tokens, seed=num_tokens, causal=causal)
    entries = pack_entries(maps, causal)
    assert entries.shape[-1] == num_entries(num_tokens, causal)
    assert torch.equal(unpack_entries(entries, num_tokens, causal), maps)


def test_entries_of_another_size_are_refused():
    with pytest.raises(ValueError, match="5 entries cannot fill a causal map of 3"):
        unpack_entries(torch.zeros(5), 3, causal=True)


@pytest.mark.parametrize("config", CODECS, ids=lambda config: f"{config.name}-{config.causal}")
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9, 40])
def test_decoded_maps_are_within_the_stated_bound(config, num_tokens):
    maps = random_maps(4, num_tokens, seed=3, causal=config.causal)
    encoded = MapCodec(config).encode(maps)
    assert encoded.codes_LC.dtype == code_dtype(config)
    assert encoded.codes_LC.shape == (4, config.num_codes(num_tokens))
    assert encoded.codes_LC.element_size() * config.num_codes(num_tokens) == math.ceil(
        num_entries(num_tokens, config.causal) * config.bits / 8
    )
    assert encoded.caps_L.dtype == torch.float32
    decoded = MapCodec(config).decode(encoded).double()
    exact = maps.double()
    if config.name == "float16":
        bound = torch.maximum(exact * 2**-11, torch.tensor(2.0**-25))
    else:
        cap = encoded.caps_L.double()[:, None, None]
        exact = exact.minimum(cap)
        radius = 0.5 / config.max_code
        bound = cap * (2 * (exact / cap).sqrt() * radius + radius**2) * (1 + 1e-4)
        assert bool((bound <= LARGEST_ERROR[config.name] * cap * (1 + 1e-4)).all())
    assert bool(((decoded - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_cap_is_six_three_or_two_times_the_sink_threshold_of_the_whole_square_on_its_grid(name):
    maps = random_maps(3, 40, seed=1)
    flat = maps.double().flatten(1)
    factor = {"sqrt8": 6, "sqrt4": 3, "sqrt2": 2}[name]
    assert MapCodecConfig(name=name).cap_factor == factor
    limit = factor * (flat.mean(1) + flat.std(1, correction=1))
    caps = MapCodec(MapCodecConfig(name=name)).encode(maps).caps_L.double()
    exact = limit.minimum(flat.amax(1))
    assert bool(((caps >= exact * (1 - 1e-6)) & (caps <= exact * (1 + 1e-6) + 2**-24)).all())
    assert torch.equal(caps * 2**24, (caps * 2**24).round())
    assert bool((flat.amax(1) > limit).any())


def test_the_first_entry_is_in_the_lowest_bits_of_a_byte():
    values = torch.tensor([[9.0, 0.0], [4.0, 1.0]])[None] / 9
    for name, expected in (("sqrt2", [0b01_10_11]), ("sqrt4", [10 << 4 | 15, 5]), ("sqrt8", [255, 170, 85])):
        assert MapCodec(MapCodecConfig(name=name)).encode(values).codes_LC.tolist() == [expected]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_codes_decodes_at_once(name):
    config = MapCodecConfig(name=name)
    encoded = [MapCodec(config).encode(random_maps(3, 7, seed)) for seed in range(2)]
    parts = {part: torch.stack([getattr(e, part) for e in encoded]) for part in ("codes_LC", "caps_L")}
    stacked = replace(encoded[0], **parts)
    assert torch.equal(MapCodec(config).decode(stacked)[1], MapCodec(config).decode(encoded[1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_zeros_stays_zero(name):
    config = MapCodecConfig(name=name)
    assert not MapCodec(config).decode(MapCodec(config).encode(torch.zeros(1, 4, 4))).any()


def test_codes_of_another_codec_or_size_are_refused():
    encoded = MapCodec(MapCodecConfig(name="sqrt4")).encode(random_maps(1, 9, seed=0))
    for name, num_tokens in (("sqrt2", 9), ("float16", 9), ("sqrt4", 8)):
        with pytest.raises(ValueError, match=f"but codec {name} stores"):
            MapCodec(MapCodecConfig(name=name)).decode(replace(encoded, num_tokens=num_tokens))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_maps_that_are_no_probabilities_are_refused(value):
    maps = random_maps(1, 4, seed=0)
    maps[0, 2, 1] = value
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        MapCodec(MapCodecConfig(name="sqrt8")).encode(maps)


def test_a_causal_codec_refuses_maps_that_attend_both_ways():
    with pytest.raises(ValueError, match=r"set map_codec\.causal to false"):
        MapCodec(MapCodecConfig(name="float16")).encode(random_maps(1, 4, seed=0, causal=False))


def test_unknown_codec_settings_fail():
    with pytest.raises(ValueError, match="bits"):
        MapCodecConfig.model_validate({"name": "sqrt8", "bits": 4})


@pytest.mark.parametrize("num_tokens", [2, 9, 64])
def test_the_keep_mask_is_the_textbook_one_in_float64(num_tokens):
    maps = random_maps(6, num_tokens, seed=5)
    exact = maps.double()
    threshold = exact.mean((1, 2)) + exact.flatten(1).std(1, correction=1)
    expected = (exact <= threshold[:, None, None]) & (exact > 0)
    assert torch.equal(sink_keep_mask(maps), expected)
    # A map alone and in a batch give the same bits.
    assert torch.equal(sink_keep_mask(maps[2]), sink_keep_mask(maps)[2])


@pytest.mark.parametrize(
    ("name", "num_layers", "num_tokens", "expected"),
    [
        ("auto", 5, 699, "sqrt8"),
        ("auto", 5, 700, "sqrt4"),
        ("auto", 4, 700, "sqrt8"),
        ("auto", 1, 10_000, "sqrt8"),
        ("sqrt4", 1, 10, "sqrt4"),
    ],
)
def test_auto_takes_4_bits_for_large_maps_in_wide_windows_alone(name, num_layers, num_tokens, expected):
    windows = [range(start, start + num_layers) for start in range(3)]
    assert MapCodecConfig.of_windows(name, windows, causal=True).of_size(num_tokens).name == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_tokens", "name"), [(9, "sqrt8"), (10, "sqrt4")])
def test_auto_codes_a_small_map_in_8_bits_and_any_other_in_4(num_tokens, name, causal):
    rows = ((0, 1), (1, 2))
    auto = MapCodec(MapCodecConfig(name="auto", causal=causal, sqrt8_below=10), rows)
    alone = MapCodec(MapCodecConfig(name=name, causal=causal), rows)
    maps = random_maps(3, num_tokens, seed=5, causal=causal)
    found, expected = auto.encode(maps), alone.encode(maps)
    auto.check(found)
    assert torch.equal(found.codes_LC, expected.codes_LC)
    assert torch.equal(found.caps_L, expected.caps_L)
    assert torch.equal(auto.decode(found), alone.decode(expected))
    for ours, theirs in zip(auto.decode_windows(found), alone.decode_windows(expected), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="but codec auto stores"):
        auto.decode(replace(found, num_tokens=19 - num_tokens))
