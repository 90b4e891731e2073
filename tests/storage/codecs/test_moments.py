"""The sink threshold of any window from means and covariances of its layers."""

import pytest
import torch

from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.moments import layer_moments, window_thresholds
from storage.codecs.sinks import sink_keep_mask, sink_threshold
from storage.codecs.triangle import pack_entries
from storage.codecs.windows import window_means
from tests.storage.builders import random_maps

ROWS = ((0,), (1, 3), (0, 1, 2, 3), (3, 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 20, 64])
def test_the_threshold_of_any_window_is_that_of_its_uncoded_map(num_tokens, causal):
    maps = random_maps(4, num_tokens, seed=num_tokens, causal=causal)
    moments = layer_moments(pack_entries(maps, causal), num_tokens**2)
    expected = sink_threshold(window_means(maps, ROWS).flatten(1), num_tokens**2)
    assert window_thresholds(ROWS, *moments).tolist() == pytest.approx(expected.tolist(), rel=2**-22)


def test_covariances_are_the_textbooks_and_do_not_cancel():
    maps = random_maps(3, 12, seed=0)
    # Hardly any of it varies, as in the map of a teacher that looks everywhere.
    maps[1] = 0.05 + maps[1] * 1e-4
    means, covariances = layer_moments(maps.flatten(1), 144)
    expected = torch.cov(maps.flatten(1).double())
    torch.testing.assert_close(means.double(), maps.double().mean((1, 2)), rtol=2**-23, atol=0)
    torch.testing.assert_close(covariances.double(), pack_entries(expected, causal=True), rtol=2**-23, atol=0)


def test_a_map_of_one_value_has_its_value_for_a_threshold():
    maps = torch.full((2, 5, 5), 0.04)
    assert window_thresholds(((0, 1),), *layer_moments(maps.flatten(1), 25)).tolist() == pytest.approx([0.04], rel=1e-6)
    assert window_thresholds((), *layer_moments(maps.flatten(1), 25)).shape == (0,)


@pytest.mark.parametrize("causal", [True, False])
def test_windows_that_are_not_stored_have_nearly_exact_masks_at_8_bits(causal):
    codec = MapCodec(MapCodecConfig(name="sqrt8", causal=causal), ((0, 1),))
    maps = random_maps(4, 40, seed=5, causal=causal)
    _, keep = codec.estimate_windows(codec.encode(maps), ROWS)
    wrong = keep != sink_keep_mask(window_means(maps, ROWS))
    assert float(wrong.float().mean()) < 0.004


@pytest.mark.parametrize("num_tokens", [32, 33, 70])
def test_the_last_keys_of_windows_that_are_not_stored_are_exact_to_float16(num_tokens):
    config = MapCodecConfig(name="sqrt2")
    maps = random_maps(4, num_tokens, seed=6)
    codec = MapCodec(config, ((0, 1),))
    found, keep = codec.estimate_windows(codec.encode(maps), ROWS)
    exact = window_means(maps, ROWS)
    first = num_tokens - config.tail_block_size(num_tokens)
    assert num_tokens - first == {32: 1, 33: 2, 70: 3}[num_tokens]
    torch.testing.assert_close(found[:, :, first:], exact[:, :, first:], rtol=2**-11, atol=2**-25)
    assert torch.equal(keep[:, :, first:], sink_keep_mask(exact)[:, :, first:])


def test_maps_that_attend_both_ways_have_no_short_columns_and_no_tail_block():
    config = MapCodecConfig(name="sqrt2", causal=False)
    maps = random_maps(4, 40, seed=6, causal=False)
    assert MapCodec(config, ((0, 1),)).encode(maps).windows.tail_blocks_LY.shape == (4, 0)
