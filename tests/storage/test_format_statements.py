"""What FORMAT.md says in words, beside its dumps, is so."""

import math
import re
from fractions import Fraction
from typing import get_args

import pytest
import torch

from stages.unusable_sample import Reason
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.codecs.map_entries import code_squares
from storage.codecs.triangle import unpack_entries
from storage.digests import canonical_json
from tests.storage.builders import manifest, random_maps
from tests.storage.test_format import DOCUMENT


def test_the_documents_reasons_are_those_of_the_code():
    section = DOCUMENT.read_text().partition("## Reasons")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(get_args(Reason))


def test_canonical_json_is_the_documents():
    value = {"ü": [3.0, 0.1, 1e-5, 1e16, 2], "a": 'é\U0001f642\x7f"\\\n\x1f'}
    written = '{"a":"é\U0001f642\x7f\\"\\\\\\n\\u001f","ü":[3.0,0.1,1e-05,1e+16,2]}'
    assert canonical_json(value) == written.encode()


@pytest.mark.parametrize("codec", ["sqrt8", "float16"])
def test_masks_by_exact_fractions_are_those_of_float64_for_thresholds_of_any_bits(codec):
    made_for = manifest(map_codec=MapCodecConfig(name=codec), layers=(0, 1, 2), windows=((0, 1, 2),))
    config, layers = made_for.fingerprint.map_codec, made_for.fingerprint.layers
    coder = MapCodec.of_layers(config, layers, made_for.fingerprint.windows)
    encoded = coder.encode(random_maps(3, 12, 5))
    assert encoded.windows is not None
    threshold = Fraction(encoded.windows.thresholds_W.item())
    assert (threshold * 2**24).denominator > 1
    squares_LE = code_squares(config, encoded.codes_LC, encoded.num_tokens)
    caps = [Fraction(cap) for cap in encoded.caps_L.tolist()]
    columns = zip(*squares_LE.double().tolist(), strict=True)
    sums = [sum(Fraction(code) * cap for code, cap in zip(column, caps, strict=True)) for column in columns]
    exact = torch.tensor([total <= config.max_code**2 * 3 * threshold for total in sums])
    flips = coder.decode_flips(encoded)
    exact[flips] ^= True
    assert torch.equal(unpack_entries(exact[None], 12, True), coder.decode_windows(encoded)[1])


def test_beside_a_tail_of_nothing_tail_samples_are_0_and_weigh_nothing():
    codec = LogitCodecConfig(
        vocab_size=10, top_k=4, num_exact=1, num_levels=64, num_tail_samples=3, temperatures=(2.0,)
    )
    logits_RV = torch.full((1, 10), -torch.inf)
    logits_RV[0, [3, 5]] = torch.tensor([1.0, 2.0])
    records_RQ = AnswerLogitsCodec(codec).encode(logits_RV, torch.tensor([0.5]))
    found = AnswerLogitsCodec(codec).decode(records_RQ)
    assert found.tails_RX.tolist() == [[-math.inf, -math.inf]]
    for temperature in (1.0, 2.0):
        _, mass_R, sampled_RD = found.probabilities(temperature)
        assert mass_R.tolist() == [0]
        assert sampled_RD.shape[1] > 0
        assert not sampled_RD.any()


def test_of_other_windows_a_decoded_zero_is_kept_in_causal_maps_alone():
    for causal in (True, False):
        config = MapCodecConfig(name="sqrt2", causal=causal)
        coder = MapCodec(config, ((0, 1),))
        maps_NN, keep_NN = (
            part[0] for part in coder.estimate_windows(coder.encode(random_maps(2, 20, 3, causal)), ((0,),))
        )
        zeros_NN = (maps_NN == 0) & torch.ones_like(keep_NN).tril() if causal else maps_NN == 0
        assert bool(zeros_NN.any())
        assert bool((keep_NN[zeros_NN] == causal).all())
