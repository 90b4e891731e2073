import json

import pytest
import torch

from benchmarks.answer_logits import make_rows
from benchmarks.results import RESULTS
from benchmarks.tempered_logits import WAYS, Sizes, Stored, gradient_noise, measure
from stages.student.losses.logits import teacher_rows
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig

DEFAULT = next(name for name in WAYS if name.startswith("default"))
BEFORE = next(name for name in WAYS if name.endswith("from temperature 1"))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_noise_by_the_formula_is_that_of_stored_rows(temperature: float) -> None:
    teacher_RV = make_rows("medium", 1, 200)
    codec = LogitCodecConfig(vocab_size=200, top_k=10, num_tail_samples=7, temperatures=(2.0,), num_tempered_samples=7)
    addresses_R = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    records_RQ = AnswerLogitsCodec(codec).encode(teacher_RV.expand(4000, -1), addresses_R)
    rows = teacher_rows(AnswerLogitsCodec(codec).decode(records_RQ), 200, temperature)
    estimates_RV = torch.zeros(4000, 200).scatter_add_(1, rows.ids_RA, rows.weights_RA).double() / temperature
    expected = gradient_noise(teacher_RV, temperature, Stored(10, 7, own_tail=True))
    assert float(estimates_RV.var(0).sum().sqrt()) == pytest.approx(float(expected), rel=0.01)


def test_own_tails_and_more_of_them_are_less_noisy_and_a_whole_vocabulary_is_not_noisy_at_all() -> None:
    found = measure(Sizes(vocabularies=(600,), temperatures=(2.0,), rows=2))["600"]
    for kind, ways in found.items():
        if kind != "row_bytes":
            noise = [ways[f"temperature 2, {name}"]["student off by 0.1"] for name in WAYS]
            assert noise == sorted(noise, reverse=True)
            assert noise[-1] == 0 < noise[-2] < noise[0] / 3


def test_the_saved_results_hold_what_the_documents_claim() -> None:
    saved = json.loads((RESULTS / "tempered_logits.json").read_text())
    document = (RESULTS.parents[1] / "docs/codecs.md").read_text()
    ratios = []
    for vocab, found in saved["vocabularies"].items():
        sizes = found.pop("row_bytes")
        if int(vocab) > 1024:
            cells = [f"{sizes[name]:,}" for name in ("temperature 1 alone", BEFORE, DEFAULT)]
            assert f"| {int(vocab):,} | {' | '.join(cells)} |" in document
        for ways in found.values():
            before, now = (ways[f"temperature 2, {name}"] for name in (BEFORE, DEFAULT))
            ratios += [before[student] / now[student] for student in now]
    assert f"by a factor of {round(min(ratios))} to {round(max(ratios))}" in document
    assert {"hardware", "date", "command"} <= saved.keys()
