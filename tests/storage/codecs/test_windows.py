"""Windows of coded maps: exact masks, exact means of keys, and bytes for the difference alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig, num_entries
from storage.codecs.sinks import decode_flips, encode_flips, sink_keep_mask
from storage.codecs.windows import window_means, window_rows
from tests.storage.builders import random_maps

NAMES = ("float16", "sqrt8", "sqrt4", "sqrt2")
ROWS = ((0, 1), (1, 2, 3), (3,))


def test_rows_of_windows_are_counted_among_the_captured_layers():
    assert window_rows((13, 14, 15), ((13, 14), (15,))) == ((0, 1), (2,))


def test_window_means_are_those_of_float64():
    maps = random_maps(4, 9, seed=1)
    expected = [maps.double()[list(rows)].mean(0).float() for rows in ROWS]
    assert torch.equal(window_means(maps, ROWS), torch.stack(expected))
    assert window_means(maps, ()).shape == (0, 9, 9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
def test_masks_are_exact_and_each_keys_mean_is_that_of_the_uncoded_window(name, causal, num_tokens):
    config = MapCodecConfig(name=name, causal=causal)
    maps = random_maps(4, num_tokens, seed=num_tokens, causal=causal)
    codec = MapCodec(config, ROWS)
    encoded = codec.encode(maps)
    found, keep = codec.decode_windows(encoded)
    exact = window_means(maps, ROWS)
    assert torch.equal(keep, sink_keep_mask(exact))

    coded = window_means(codec.decode(encoded), ROWS)
    worst = ((coded - exact).abs() * keep).amax(-2).double()
    assert bool((((found - exact).abs() * keep).amax(-2) <= 2 * worst + 1e-7).all())
    count = keep.sum(-2).clamp(min=1)
    off = ((found.double() - exact.double()) * keep).sum(-2) / count
    bound = torch.clamp(encoded.windows.shifts_WN.double().abs() * 2**-11, min=2**-25) + 1e-7 * exact.amax(-2)
    assert bool((off.abs() <= bound).all())
    # Outside the masks nothing is moved: those entries are in no mean. Those of the tail block are 16-bit floats.
    first = num_tokens - config.tail_block_size(num_tokens)
    coded[:, first:, first:] = window_means(maps.half(), ROWS)[:, first:, first:]
    assert torch.allclose(found[~keep], coded[~keep], rtol=1e-6, atol=1e-9)
    assert torch.allclose(found[:, first:, first:], exact[:, first:, first:], rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("name", NAMES)
def test_masks_hold_zeros_inside_the_triangle_and_maps_of_zeros(name):
    maps = random_maps(4, 20, seed=3)
    maps[:, 12, 4:9] = 0
    maps[3] = 0
    codec = MapCodec(MapCodecConfig(name=name), ROWS)
    found, keep = codec.decode_windows(codec.encode(maps))
    assert torch.equal(keep, sink_keep_mask(window_means(maps, ROWS)))
    assert not keep[0, 12, 4:9].any()
    assert not keep[2].any()
    assert not found[2].any()


def test_the_finer_the_codes_the_fewer_bytes_correct_their_masks():
    maps = random_maps(4, 60, seed=2)
    sizes = []
    for name in NAMES:
        encoded = MapCodec(MapCodecConfig(name=name), ROWS).encode(maps)
        sizes.append(int((encoded.windows.flips_G < 255).sum()))
    assert sizes == sorted(sizes)
    # A bit an entry would be 686 bytes.
    assert len(ROWS) * num_entries(60, causal=True) == 5490
    assert sizes[2] < 200


def test_layers_too_few_for_the_windows_are_refused():
    config = MapCodecConfig(name="sqrt4")
    maps = random_maps(4, 9, seed=0)
    encoded = MapCodec(config, ROWS).encode(maps)
    with pytest.raises(ValueError, match="do not belong to 2 windows of 9 image tokens"):
        MapCodec(config, ROWS[:2]).decode_windows(encoded)


def test_the_codec_refuses_what_is_no_probability():
    maps = random_maps(4, 9, seed=0)
    maps[1, 5, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        MapCodec(MapCodecConfig(name="sqrt4"), ROWS).encode(maps)


def test_flips_are_the_gaps_before_them():
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[[1, 2, 303, 558, 814]] = True
    encoded = encode_flips(mask)
    assert encoded.tolist() == [1, 0, 255, 45, 254, 255, 0]
    assert decode_flips(encoded, 1000).tolist() == [1, 2, 303, 558, 814]
    with pytest.raises(ValueError, match="a flip lies at entry 814 of masks that have 814 entries"):
        decode_flips(encoded, 814)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2000), st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]), st.integers(0, 2**32 - 1))
def test_flips_round_trip(count, share, seed):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    places = decode_flips(encode_flips(mask), count)
    assert torch.equal(places, mask.nonzero()[:, 0])
