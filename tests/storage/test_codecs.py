"""Codecs against float64 and by round trip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs import (
    MapCodecConfig,
    decode_maps,
    encode_maps,
    num_entries,
    pack_entries,
    pack_mask,
    packed_mask_bytes,
    sink_keep_mask,
    top_k_logprobs,
    unpack_entries,
    unpack_mask,
)
from storage.codecs.answer_logits import renormalized
from tests.storage.builders import random_maps

CODECS = [MapCodecConfig(name=name, causal=causal) for name in ("float16", "sqrt8") for causal in (True, False)]


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
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
def test_decoded_maps_are_within_the_stated_bound(config, num_tokens):
    maps = random_maps(4, num_tokens, seed=3, causal=config.causal)
    encoded = encode_maps(config, maps)
    assert encoded.codes_LE.dtype == config.dtype
    assert encoded.codes_LE.shape == (4, config.num_codes(num_tokens))
    assert encoded.caps_L.dtype == torch.float32
    decoded = decode_maps(config, encoded.codes_LE, encoded.caps_L, num_tokens).double()
    exact = maps.double()
    if config.name == "float16":
        bound = torch.maximum(exact * 2**-11, torch.tensor(2.0**-25))
    else:
        cap = encoded.caps_L.double()[:, None, None]
        exact = exact.minimum(cap)
        radius = 0.5 / 255
        bound = cap * (2 * (exact / cap).sqrt() * radius + radius**2) * (1 + 1e-4)
        assert bool((bound <= 0.00393 * cap * (1 + 1e-4)).all())
    assert bool(((decoded - exact).abs() <= bound).all())


def test_the_cap_is_three_times_the_sink_threshold_of_the_whole_square():
    maps = random_maps(3, 40, seed=1)
    flat = maps.double().flatten(1)
    limit = 3 * (flat.mean(1) + flat.std(1, correction=1))
    caps = encode_maps(MapCodecConfig(name="sqrt8"), maps).caps_L
    assert torch.allclose(caps.double(), limit.minimum(flat.amax(1)), rtol=1e-6)
    assert bool((flat.amax(1) > limit).any())


def test_a_batch_of_codes_decodes_at_once():
    config = MapCodecConfig(name="sqrt8")
    encoded = [encode_maps(config, random_maps(3, 7, seed)) for seed in range(2)]
    codes, caps = (torch.stack([getattr(e, name) for e in encoded]) for name in ("codes_LE", "caps_L"))
    batch = decode_maps(config, codes, caps, 7)
    assert torch.equal(batch[1], decode_maps(config, encoded[1].codes_LE, encoded[1].caps_L, 7))


def test_a_map_of_zeros_stays_zero():
    config = MapCodecConfig(name="sqrt8")
    encoded = encode_maps(config, torch.zeros(1, 4, 4))
    assert not decode_maps(config, encoded.codes_LE, encoded.caps_L, 4).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_maps_that_are_no_probabilities_are_refused(value):
    maps = random_maps(1, 4, seed=0)
    maps[0, 2, 1] = value
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        encode_maps(MapCodecConfig(name="sqrt8"), maps)


def test_a_causal_codec_refuses_maps_that_attend_both_ways():
    with pytest.raises(ValueError, match=r"set map_codec\.causal to false"):
        encode_maps(MapCodecConfig(name="float16"), random_maps(1, 4, seed=0, causal=False))


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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
def test_packing_masks_round_trips(num_tokens, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, num_tokens, num_tokens, generator=generator) < 0.5
    mask = mask.tril() if causal else mask
    packed = pack_mask(mask, causal)
    assert packed.shape == (2, packed_mask_bytes(num_tokens, causal))
    assert torch.equal(unpack_mask(packed, num_tokens, causal), mask)


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 3, 3] = True
    assert pack_mask(mask, causal=True).tolist() == [[1, 2]]


@pytest.mark.parametrize("k", [1, 5, 64, 400, 1000])
def test_log_probabilities_agree_with_float64(k):
    logits_RV = torch.randn(130, 400, generator=torch.Generator().manual_seed(k)) * 4
    kept = top_k_logprobs(logits_RV, k)
    exact = logits_RV.double().log_softmax(-1)
    best, ids = exact.sort(dim=-1, descending=True, stable=True)
    k = min(k, 400)
    assert torch.equal(kept.ids_RK, ids[:, :k].int())
    error = (kept.logprobs_RK.double() - best[:, :k]).abs()
    assert bool((error <= 2**-11 * best[:, :k].abs().clamp(min=2**-14)).all())
    tail = best[:, k:].exp().sum(-1)
    if k < 400:
        assert torch.allclose(kept.tail_logmass_R.double().exp(), tail, rtol=1e-5, atol=0)
    else:
        assert bool((kept.tail_logmass_R == -torch.inf).all())
    assert torch.allclose(kept.log_partition_R.double(), logits_RV.double().logsumexp(-1), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_kept_and_tail_mass_sum_to_one_within_the_stated_bound(scale):
    logits_RV = torch.randn(100, 2000, generator=torch.Generator().manual_seed(0)) * scale
    kept = top_k_logprobs(logits_RV, 64)
    stored = kept.logprobs_RK.double()
    total = stored.exp().sum(-1) + kept.tail_logmass_R.double().exp()
    surprise = (stored.exp() * stored.abs()).sum(-1)
    assert bool(((total - 1).abs() <= 1.02 * 2**-11 * surprise + 1e-7).all())
    assert float((total - 1).abs().max()) <= 5e-4
    probs_RK, tail_R = renormalized(kept)
    exact = logits_RV.double().softmax(-1)
    exact_RK = exact.gather(1, kept.ids_RK.long())
    rest_R = exact.scatter(1, kept.ids_RK.long(), 0).sum(-1)
    divergence = (exact_RK * (exact_RK / probs_RK).log()).sum(-1) + rest_R * (rest_R / tail_R).log()
    assert float(divergence.max()) <= 3e-6


def test_a_tail_below_the_rounding_of_the_kept_values_is_exact():
    logits_RV = torch.zeros(1, 100)
    logits_RV[0, 7] = 20.0
    tail = top_k_logprobs(logits_RV, 1).tail_logmass_R.double()
    assert torch.allclose(tail.exp(), torch.tensor([99 / (99 + math.exp(20))]).double(), rtol=1e-5)


def test_equal_logits_are_taken_by_rising_id():
    logits_RV = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert top_k_logprobs(logits_RV, 4).ids_RK.tolist() == [[1, 3, 2, 4]]
    assert top_k_logprobs(torch.zeros(2, 5), 3).ids_RK.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_no_rows_and_forbidden_tokens_are_fine_but_nan_is_not():
    assert top_k_logprobs(torch.zeros(0, 9), 4).ids_RK.shape == (0, 4)
    logits_RV = torch.tensor([[0.0, -torch.inf, 0.0]])
    kept = top_k_logprobs(logits_RV, 3)
    assert kept.ids_RK.tolist() == [[0, 2, 1]]
    assert kept.logprobs_RK[0, 2] == -torch.inf
    for bad in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="NaN"):
            top_k_logprobs(torch.tensor([bad]), 1)
