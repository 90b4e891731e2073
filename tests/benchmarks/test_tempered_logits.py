import json

import pytest
import torch

from benchmarks.answer_logits import KINDS, make_rows
from benchmarks.results import RESULTS
from benchmarks.tempered_logits import COUNTS, USUAL, WHOLE, Sizes, gradient_error, gradient_noise, measure, name_of
from stages.student.losses.logits import teacher_rows
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import SMALL_VOCABULARY, LogitCodecConfig

NEAR = "student off by 0.1"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_noise_and_error_by_the_formulas_are_those_of_stored_rows(temperature: float) -> None:
    teacher_RV = make_rows("medium", 1, 200)
    codec = LogitCodecConfig(vocab_size=200, top_k=10, num_tail_samples=7, temperatures=(2.0,), num_tempered_samples=7)
    addresses_R = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    records_RQ = AnswerLogitsCodec(codec).encode(teacher_RV.expand(4000, -1), addresses_R)
    rows = teacher_rows(AnswerLogitsCodec(codec).decode(records_RQ), 200, temperature)
    estimates_RV = torch.zeros(4000, 200).scatter_add_(1, rows.ids_RA, rows.weights_RA).double() / temperature
    noise = float(gradient_noise(teacher_RV, temperature, codec))
    assert float(estimates_RV.var(0).sum().sqrt()) == pytest.approx(noise, rel=0.01)
    exact_RV = (teacher_RV / temperature).softmax(-1) / temperature
    error = float((estimates_RV - exact_RV).square().sum(-1).mean().sqrt())
    assert error == pytest.approx(float(gradient_error(teacher_RV, temperature, codec)), rel=0.01)
    assert error > noise


def test_longer_records_err_less_and_whole_vocabularies_less_than_temperature_1_does() -> None:
    found = measure(Sizes(vocabularies=(600,), temperatures=(2.0,), rows=2))["600"]
    for kind in KINDS:
        part, whole = (found[kind][f"temperature 2, {name}"][NEAR] for name in (name_of(COUNTS[0]), WHOLE))
        assert whole < min(part / 10, found[kind][USUAL][NEAR])


def test_the_tables_of_the_document_are_those_of_the_saved_results() -> None:
    saved = json.loads((RESULTS / "tempered_logits.json").read_text())
    page = (RESULTS.parents[1] / "docs/codecs.md").read_text().splitlines()
    for vocab, found in saved["vocabularies"].items():
        for row in (bytes_row(int(vocab), found["row_bytes"]), *(error_row(int(vocab), k, found[k]) for k in KINDS)):
            assert row in page
    assert {"hardware", "date", "command"} <= saved.keys()


def bytes_row(vocab: int, sizes: dict[str, int]) -> str:
    cells = [sizes.get(name) for name in (USUAL, name_of(COUNTS[0]), name_of(COUNTS[-1]), WHOLE)]
    return f"| {vocab:,} | {' | '.join('' if size is None else f'{size:,}' for size in cells)} |"


def error_row(vocab: int, kind: str, errors: dict[str, dict[str, float]]) -> str:
    part, longer = name_of(COUNTS[0]), name_of(COUNTS[-1])
    columns = [(1.5, part), (1.5, longer), (2, part), (2, longer), (2, WHOLE), (4, part), (4, WHOLE)]
    names = [USUAL, *(f"temperature {temperature}, {way}" for temperature, way in columns)]
    cells = [printed(errors[name][NEAR]) if name in errors else "" for name in names]
    return f"| {vocab:,} | {kind} | {' | '.join(cells)} |"


def printed(error: float) -> str:
    """Two digits, without powers of ten."""
    return f"{float(f'{error:.2g}'):g}"


def test_the_saved_results_hold_what_the_document_claims() -> None:
    saved = json.loads((RESULTS / "tempered_logits.json").read_text())["vocabularies"]
    for vocab, found in saved.items():
        for kind in KINDS:
            errors = {name: students[NEAR] for name, students in found[kind].items()}
            few = kind == "options"
            for temperature in ("1.5", "2", *(() if few and int(vocab) > SMALL_VOCABULARY else ("4",))):
                assert errors[f"temperature {temperature}, {WHOLE}"] < errors[USUAL], (vocab, kind, temperature)
            if int(vocab) > COUNTS[-1] and not few:
                assert errors[f"temperature 1.5, {name_of(COUNTS[-1])}"] < errors[USUAL]
            assert all(5 < near / found[kind][name]["student off by 1"] < 35 for name, near in errors.items())
