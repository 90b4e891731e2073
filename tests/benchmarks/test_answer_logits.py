import json
from pathlib import Path

import pytest
import torch

from benchmarks import answer_logits
from benchmarks.answer_logits import (
    BUDGET_BYTES,
    KINDS,
    Sizes,
    bucket_gradient,
    coding_error,
    coding_shift,
    dense_gradient,
    drawn_gradients,
    make_rows,
    measure,
    truncated_gradient,
)
from storage.codecs.codec_settings import LogitCodecConfig

FLOAT32 = 1e-5
"""Of the gradients that are averaged."""
TINY = Sizes(vocab=400, rows=4, gradient_rows=1, addresses=100, timed_rows=4, repeats=1)


def test_the_coding_error_is_the_kl_of_the_distribution_over_kept_tokens_and_tail() -> None:
    exact, decoded = torch.tensor([[0.5, 0.3]]).double(), torch.tensor([[0.4, 0.4]]).double()
    error = coding_error(exact.log(), decoded.log(), torch.tensor([0.2]).double().log())
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    assert float(error) == pytest.approx(float((p * (p / q).log()).sum()))


def test_the_alternatives_have_the_dense_gradient_when_they_keep_every_token() -> None:
    teacher, student = make_rows("medium", 2, 30), make_rows("flat", 2, 30, seed=1)
    expected = dense_gradient(student, teacher)
    torch.testing.assert_close(truncated_gradient(student, teacher, 30), expected)
    torch.testing.assert_close(bucket_gradient(student, teacher, 29), expected)
    assert float((bucket_gradient(student, teacher, 5) - expected).norm()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_shuffled_and_as_peaked_as_they_are_called(kind: str) -> None:
    probs = make_rows(kind, 8, 2000).softmax(-1)
    assert len(probs.argmax(-1).unique()) > 4
    largest = probs.amax(-1)
    assert bool((largest > 0.8).all()) == (kind == "peaked")


def test_draws_are_unbiased_and_what_stores_none_is_not() -> None:
    result = measure(TINY)
    assert json.loads(json.dumps(result))["default"]["row_bytes"] <= BUDGET_BYTES
    for kind in KINDS:
        errors = result["gradient_in_norms_of_the_dense_one_at_k_64"][kind]
        drawn = [errors[f"{count} draws"] for count in (1, 2, 4, 8)]
        assert all(error["bias_of_draws"] < 3 * error["noise_of_the_mean"] + FLOAT32 for error in drawn)
        assert all(0 < error["bias_of_coding"] < 0.01 for error in drawn)
        assert drawn[0]["noise"] > drawn[1]["noise"] > drawn[2]["noise"] > drawn[3]["noise"] > 0
        assert errors["rows_from_which_default_is_closer"] >= 1
    flat = result["gradient_in_norms_of_the_dense_one_at_k_64"]["flat"]
    assert flat["0 draws, top-k alone"]["bias"] > 0.1


@pytest.mark.slow
def test_what_codes_shift_is_what_is_left_when_nothing_is_drawn_and_more_levels_shift_less() -> None:
    (teacher,) = make_rows("options", 1, 60)
    shifts = {
        levels: float(coding_shift(teacher, LogitCodecConfig(vocab_size=60, top_k=50, num_levels=levels), 1.0).norm())
        for levels in (64, 128, 256)
    }
    assert shifts[64] > 1.5 * shifts[128] > 2.25 * shifts[256] > 0
    student = torch.zeros(1, 60, dtype=torch.float64)
    codec = LogitCodecConfig(vocab_size=60, top_k=50, num_levels=64, num_tail_samples=10, temperatures=(2.0,))
    for temperature in (1.0, 2.0):
        drawn = drawn_gradients(student[0], teacher, codec, Sizes(addresses=20_000), temperature).double().mean(0)
        dense = dense_gradient(student, teacher[None], temperature)[0]
        left = (drawn - dense - coding_shift(teacher, codec, temperature)).norm()
        assert float(left) < 0.05 * float((drawn - dense).norm())


def test_the_saved_results_hold_what_the_documents_claim() -> None:
    saved = json.loads((Path(answer_logits.__file__).parent / "results/answer_logits.json").read_text())
    assert saved["sizes"]["vocab"] == 151_936
    for name in ("default", "k = 64, 4 draws, temperatures 1 and 2"):
        assert saved[name]["row_bytes"] <= BUDGET_BYTES
        assert max(worst for _, worst in saved[name]["median_and_worst"].values()) <= 3e-5
    for kind, ways in saved["gradient_in_norms_of_the_dense_one_at_k_64"].items():
        drawn = [way for way in ways.values() if isinstance(way, dict) and "bias_of_draws" in way]
        assert len(drawn) == 6, kind
        assert all(way["bias_of_draws"] < way["noise_of_the_mean"] + FLOAT32 for way in drawn)
        assert all(way["bias_of_coding"] < 5e-3 for way in drawn)
    assert {"hardware", "date", "command"} <= saved.keys()
