"""Records of answer rows against float64: what is kept, the tail, the draws, the size."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.codecs.answer_logits import AnswerLogits, AnswerLogitsCodec
from storage.codecs.bits import pack_integers, unpack_integers
from storage.codecs.codec_settings import LogitCodecConfig, default_num_levels, default_top_k
from storage.codecs.levels import LOWEST_LOGPROB
from storage.codecs.tail_samples import row_addresses

QWEN_VOCAB = 151_936


def normal_logits(num_rows: int, vocab: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def stored(logits_RV: Tensor, addresses_R: Tensor | None = None, **settings: object) -> AnswerLogits:
    codec = LogitCodecConfig.model_validate({"vocab_size": logits_RV.shape[1], **settings})
    if addresses_R is None:
        addresses_R = row_addresses("key", len(logits_RV))
    return AnswerLogitsCodec(codec).decode(AnswerLogitsCodec(codec).encode(logits_RV, addresses_R))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(0, 9), st.integers(0, 3), st.integers(0, 99))
def test_packed_integers_round_trip(width, count, num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**width, (num_rows, count), generator=generator)
    packed = pack_integers(values, width)
    assert packed.shape == (num_rows, math.ceil(count * width / 8))
    assert torch.equal(unpack_integers(packed, count, width), values)


@pytest.mark.parametrize("k", [1, 5, 9, 10, 64, 399, 400, 1000])
@pytest.mark.parametrize("name", ["float16", "levels"])
def test_kept_log_probabilities_are_within_the_stated_bound_of_float64(name, k):
    logits_RV = normal_logits(130, 400, 4.0, seed=k)
    found = stored(logits_RV, name=name, top_k=k)
    best, ids = logits_RV.double().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    k = min(k, 400)
    assert torch.equal(found.ids_RK, ids[:, :k])
    best = best[:, :k]
    bound = 2**-11 * best.abs().clamp(min=2**-14)
    if name == "levels" and k > 9:
        range_R1 = found.logprobs_RK[:, 7:8].double() - found.logprobs_RK[:, -1:]
        depth = ((best[:, 7:8] - best) / range_R1)[:, 8:-1].clamp(0, 1)
        rounding = bound[:, 7:8] + bound[:, -1:]
        bound[:, 8:-1] = range_R1 * (depth.sqrt() / 127 + 1 / (4 * 127**2)) + rounding
    assert bool(((found.logprobs_RK - best).abs() <= bound * 1.0001).all())


@pytest.mark.parametrize("name", ["float16", "levels"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_little_is_lost_by_coding(name, scale):
    logits_RV = normal_logits(100, 2000, scale)
    found = stored(logits_RV, name=name, top_k=64)
    probs_RK, tail_R, _ = found.probabilities()
    torch.testing.assert_close(probs_RK.sum(-1) + tail_R, torch.ones(100), rtol=0, atol=1e-6)
    exact = logits_RV.double().softmax(-1)
    exact_RK = exact.gather(1, found.ids_RK)
    rest_R = exact.scatter(1, found.ids_RK, 0).sum(-1)
    divergence = (exact_RK * (exact_RK / probs_RK).log()).sum(-1) + rest_R * (rest_R / tail_R).log()
    assert float(divergence.max()) <= (3e-6 if name == "float16" else 3e-5)


def test_tails_are_exact_at_every_stored_temperature():
    logits_RV = normal_logits(40, 500, 3.0)
    found = stored(logits_RV, top_k=20, temperatures=(0.5, 2.0, 4.0))
    logprobs = logits_RV.double().log_softmax(-1).scatter(1, found.ids_RK, -torch.inf)
    expected = torch.stack([(logprobs / t).logsumexp(-1) for t in (1, 0.5, 2, 4)], dim=1)
    torch.testing.assert_close(found.tails_RX.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_kept_and_tail_probabilities_are_those_of_the_dense_softmax_at_the_temperature(temperature):
    logits_RV = normal_logits(40, 500, 3.0)
    found = stored(logits_RV, name="float16", top_k=20, temperatures=(0.5, 2.0, 4.0))
    exact = (logits_RV.double() / temperature).softmax(-1)
    probs_RK, tail_R, _ = found.probabilities(temperature)
    torch.testing.assert_close(probs_RK.double(), exact.gather(1, found.ids_RK), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(tail_R.double(), exact.scatter(1, found.ids_RK, 0).sum(-1), rtol=1e-2, atol=0)


def test_a_temperature_that_was_not_stored_is_refused_unless_nothing_is_left_out():
    logits_RV = normal_logits(2, 30, 1.0)
    part, whole = stored(logits_RV, top_k=4, temperatures=(2.0,)), stored(logits_RV, top_k=30)
    assert part.codec.serves(2.0)
    assert not part.codec.serves(3.0)
    with pytest.raises(ValueError, match=r"temperature 3.0 was not stored, only \[1.0, 2.0\]"):
        part.probabilities(3.0)
    assert whole.codec.serves(3.0)
    exact = (logits_RV / 3).softmax(-1).gather(1, whole.ids_RK)
    torch.testing.assert_close(whole.probabilities(3.0)[0], exact, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
def test_rare_words_of_a_whole_vocabulary_are_fine_enough_for_high_temperatures(temperature):
    logits_RV = normal_logits(20, 1000, 3.0)
    exact_RV = (logits_RV.double() / temperature).softmax(-1)
    errors = []
    for num_levels in (128, default_num_levels(1000, 1000, (temperature,))):
        found = stored(logits_RV, top_k=1000, num_levels=num_levels)
        probs_RK = found.probabilities(temperature)[0].double()
        errors.append(float((probs_RK - exact_RV.gather(1, found.ids_RK)).norm() / exact_RV.norm()))
    assert errors[1] < 1.5e-3
    assert errors[0] > 8 * errors[1]


def test_a_tail_below_the_rounding_of_the_kept_values_is_exact():
    logits_RV = torch.zeros(1, 100)
    logits_RV[0, 7] = 20.0
    tail = stored(logits_RV, top_k=1).tails_RX[:, 0].double()
    assert torch.allclose(tail.exp(), torch.tensor([99 / (99 + math.exp(20))]).double(), rtol=1e-5)


def test_equal_logits_are_taken_by_rising_id():
    logits_RV = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert stored(logits_RV, top_k=4).ids_RK.tolist() == [[1, 3, 2, 4]]
    assert stored(torch.zeros(2, 5), top_k=3).ids_RK.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("name", ["float16", "levels"])
def test_no_rows_and_forbidden_tokens_are_fine_but_nan_is_not(name):
    assert stored(torch.zeros(0, 9), name=name, top_k=4).ids_RK.shape == (0, 4)
    logits_RV = torch.full((1, 30), -torch.inf)
    logits_RV[0, [0, 2]] = 0.0
    for k in (1, 3, 20, 30):
        kept = stored(logits_RV, name=name, top_k=k, temperatures=(2.0,))
        assert kept.ids_RK[0].tolist() == [0, 2, 1, *range(3, 30)][:k]
        assert bool((kept.logprobs_RK[0, 2:] <= LOWEST_LOGPROB).all())
        assert kept.fault() is None
        for temperature in (1.0, 2.0):
            probs_RK, tail_R, sampled_RD = kept.probabilities(temperature)
            assert probs_RK[0, :2].tolist() == pytest.approx([0.5, 0.5][:k], rel=1e-3)
            assert float(tail_R) == pytest.approx(0.5 if k == 1 else 0, abs=1e-3)
            assert math.isfinite(kept.gradient_noise(temperature))
            if k == 1:
                assert set(sampled_RD[0].tolist()) == {2}
    for bad in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="NaN"):
            stored(torch.tensor([bad]), top_k=1)


def test_arguments_that_do_not_fit_the_codec_are_refused():
    codec = LogitCodecConfig(vocab_size=9, top_k=2)
    with pytest.raises(ValueError, match=r"expected floats \[R, 9\]"):
        AnswerLogitsCodec(codec).encode(torch.zeros(1, 8), torch.zeros(1))
    for addresses in (torch.zeros(2), torch.ones(1)):
        with pytest.raises(ValueError, match=r"expected one in \[0, 1\) for each row"):
            AnswerLogitsCodec(codec).encode(torch.zeros(1, 9), addresses)
    with pytest.raises(ValueError, match="records are"):
        AnswerLogitsCodec(codec).decode(torch.zeros(1, codec.row_bytes + 1, dtype=torch.uint8))
    for temperatures in ((1.0,), (2.0, 2.0), (0.0,), (math.inf,)):
        with pytest.raises(ValueError, match="temperatures"):
            LogitCodecConfig(vocab_size=9, temperatures=temperatures)


@pytest.mark.parametrize(("settings", "row_bytes"), [({}, 219), ({"top_k": 256, "temperatures": (2.0,)}, 1293)])
def test_a_row_of_a_large_vocabulary_takes_the_documented_bytes(settings, row_bytes):
    codec = LogitCodecConfig(vocab_size=QWEN_VOCAB, **settings)
    assert codec.row_bytes == row_bytes
    logits_RV = normal_logits(3, QWEN_VOCAB, 3.0)
    assert AnswerLogitsCodec(codec).encode(logits_RV, row_addresses("key", 3)).shape == (3, codec.row_bytes)


def test_other_temperatures_keep_a_small_vocabulary_whole_and_more_of_a_large_one():
    assert default_top_k(1024, ()) == default_top_k(QWEN_VOCAB, ()) == 48
    assert [default_top_k(vocab, (2.0,)) for vocab in (30, 1024, 1025, QWEN_VOCAB)] == [30, 1024, 256, 256]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_every_token_outside_the_kept_ones_is_drawn_as_often_as_it_is_likely_at_the_temperature(temperature):
    # Every address of a fine grid once: means over it are those over all addresses, to 1 / grid.
    grid, draws = 20_000, 4
    logits_RV = normal_logits(1, 60, 2.0).expand(grid, -1)
    number = dict.fromkeys(("num_tail_samples", "num_tempered_samples"), draws)
    found = stored(logits_RV, (torch.arange(grid).double() + 0.5) / grid, top_k=5, temperatures=(0.5, 3.0), **number)
    exact = (logits_RV[0].double() / temperature).softmax(-1)
    rest = exact.scatter(0, found.ids_RK[0], 0)
    expected = draws * rest / rest.sum()
    _, _, sampled_RD = found.probabilities(temperature)
    counts_RV = torch.zeros(grid, 60).scatter_add_(1, sampled_RD, torch.ones(grid, draws)).double()
    torch.testing.assert_close(counts_RV.mean(0), expected, rtol=0, atol=2 / grid)
    # Never further from its expectation than the next integer, so with the least variance.
    assert bool(((counts_RV - expected).abs() < 1 + 1e-9).all())
    assert float(expected.max()) > 0.15
    assert bool((counts_RV[:, found.ids_RK[0]] == 0).all())


def test_what_temperature_1_needs_has_the_same_bytes_with_and_without_other_temperatures():
    logits_RV, addresses_R = normal_logits(5, 300, 3.0), row_addresses("key", 5)
    alone, among = (LogitCodecConfig(vocab_size=300, temperatures=temperatures) for temperatures in ((), (2.0, 4.0)))
    expected = AnswerLogitsCodec(alone).encode(logits_RV, addresses_R)
    found = AnswerLogitsCodec(among).encode(logits_RV, addresses_R)
    kept = sum(alone.sections[name] for name in ("ids", "values", "levels")) + 4
    assert torch.equal(found[:, :kept], expected[:, :kept])
    assert torch.equal(found[:, kept + 8 : kept + 8 + alone.sections["tail_sample_ids"]], expected[:, kept:])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_noise_of_the_gradient_is_what_a_near_students_gradient_has_over_many_draws(temperature):
    """In float64, by the definitions: systematic samples' variance bound over the mean gradient of many students."""
    vocab, deviation = 300, 1e-3
    logits_RV = normal_logits(1, vocab, 3.0).double()
    codec = {"name": "float16", "top_k": 40, "temperatures": (2.0, 4.0), "num_tempered_samples": 50}
    found = stored(logits_RV, **codec)
    p_V = (logits_RV[0] / temperature).softmax(-1)
    errors_RV = torch.randn(2000, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * deviation
    gradients_RV = ((logits_RV + errors_RV) / temperature).softmax(-1).sub(p_V) / temperature
    size = float(gradients_RV.square().sum(-1).mean().sqrt())
    tail = float(p_V.scatter(0, found.ids_RK[0], 0).sum())
    noise = tail / (30 if temperature == 1 else 50) ** 0.5 / temperature
    # The gradient of kept tokens alone is a part of it, nearly all where the tail is small.
    ratio = found.gradient_noise(temperature) * size / (noise * deviation)
    assert 0.97 < ratio < {1.0: 1.03, 2.0: 1.1, 4.0: 1.3}[temperature]


def test_draws_reach_the_last_token_and_never_one_without_mass():
    logits_RV = torch.full((2, 8), -torch.inf)
    logits_RV[:, [1, 3, 6]] = torch.tensor([5.0, 0.0, 0.0])
    found = stored(logits_RV, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), top_k=1, num_tail_samples=4)
    assert found.tail_ids[0][0].tolist() == [3, 3, 6, 6]
    assert set(found.tail_ids[0][1].tolist()) == {3, 6}
    assert found.tail_ids[0][1, -1] == 6


def test_addresses_follow_from_key_and_row_alone_and_are_spread_evenly():
    addresses = row_addresses("s0-1", 4000)
    assert torch.equal(row_addresses("s0-1", 7), addresses[:7])
    assert not torch.equal(row_addresses("s0-2", 7), addresses[:7])
    assert bool(((addresses >= 0) & (addresses < 1)).all())
    # Five standard errors of the mean of 4000 uniform numbers.
    assert float(addresses.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 4000) ** 0.5)
    assert len(addresses.unique()) == 4000


def test_a_record_does_not_depend_on_the_rows_beside_it():
    codec = LogitCodecConfig(vocab_size=300, top_k=20, temperatures=(2.0,))
    logits_RV, addresses_R = normal_logits(100, 300, 3.0), row_addresses("key", 100)
    whole = AnswerLogitsCodec(codec).encode(logits_RV, addresses_R)
    one_by_one = [AnswerLogitsCodec(codec).encode(logits_RV[r : r + 1], addresses_R[r : r + 1]) for r in range(100)]
    assert torch.equal(whole, torch.cat(one_by_one))


def test_encoding_leaves_its_argument_alone():
    logits_RV = normal_logits(3, 50, 1.0).double()
    before = logits_RV.clone()
    stored(logits_RV, top_k=4)
    assert torch.equal(logits_RV, before)


def test_what_no_teacher_says_is_found():
    found = stored(normal_logits(3, 50, 1.0), top_k=20, temperatures=(2.0,))
    assert found.fault() is None
    cases = {
        "ids_RK": (found.ids_RK + 50, "past the vocabulary of 50"),
        "tail_ids": ((found.tail_ids[0], found.tail_ids[1] + 50), "past the vocabulary of 50"),
        "tails_RX": (found.tails_RX * math.nan, "NaN"),
        "logprobs_RK": (found.logprobs_RK + 1, "sum to"),
    }
    for field, (value, message) in cases.items():
        assert message in str(dataclasses.replace(found, **{field: value}).fault())


def test_records_of_a_codec_of_another_size_are_found_though_they_have_as_many_bytes():
    """11 ids of 6 bits take as many bytes as 12, and so do the levels of 2 or 3 values."""
    logits_RV = normal_logits(40, 50, 1.0)
    made = LogitCodecConfig(vocab_size=50, top_k=12, num_tail_samples=4)
    records_RQ = AnswerLogitsCodec(made).encode(logits_RV, row_addresses("a", 40))
    assert AnswerLogitsCodec(made).fault(records_RQ) is None
    other = made.model_copy(update={"top_k": 11})
    assert other.row_bytes == made.row_bytes
    assert AnswerLogitsCodec(other).fault(records_RQ) == "ids of more than 66 bits"
    levels = slice(made.sections["ids"] + made.sections["values"], made.sections["ids"] + made.sections["values"] + 1)
    records_RQ[:, levels] ^= 1
    assert AnswerLogitsCodec(made).fault(records_RQ) == "levels of another number of values than 3"
