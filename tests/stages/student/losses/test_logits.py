"""Logit distillation and next-token loss: golden vectors, textbook versions in float64, and stored against dense."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.student.losses.logits import logit_distillation_loss, next_token_loss, teacher_rows
from stages.student.stage_config import Divergence
from storage.codecs.answer_logits import AnswerLogits, AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses

GOLDEN = Path(__file__).parents[3] / "golden"


def stored_loss(
    student_RV: torch.Tensor, stored: AnswerLogits, temperature: float = 1.0, divergence: Divergence = "forward"
) -> torch.Tensor:
    return teacher_rows(stored, student_RV.shape[1], temperature).loss(student_RV, divergence)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["equal_vocab", "larger_teacher_vocab"])
def test_logit_loss_reproduces_the_golden_value_and_gradient(name: str) -> None:
    golden = load_file(GOLDEN / f"logit_loss_{name}.safetensors")
    student = golden["student"].requires_grad_()
    loss = logit_distillation_loss(student[golden["keep"]], golden["teacher"][golden["keep"]])
    loss.backward()
    assert relative(loss.detach(), golden["loss"][0]) < 1e-5
    assert student.grad is not None
    assert relative(student.grad, golden["student_grad"]) < 1e-4


def test_logit_loss_is_the_teachers_entropy_at_identity_with_zero_gradient() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = logit_distillation_loss(logits, logits.detach())
    loss.backward()
    p = logits.detach().softmax(-1)
    assert float(loss.detach()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-7


def store(teacher: Tensor, addresses: Tensor | None = None, **settings: object) -> AnswerLogits:
    codec = LogitCodecConfig.model_validate({"vocab_size": teacher.shape[1], "name": "float16", **settings})
    if addresses is None:
        addresses = row_addresses("key", len(teacher))
    return AnswerLogitsCodec(codec).decode(AnswerLogitsCodec(codec).encode(teacher, addresses))


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def dense_rows(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`[R]` loss and `[R, V]` gradient of the textbook cross entropy in float64, teacher cut to the student."""
    student = student.detach().clone().requires_grad_()
    p = (teacher[:, : student.shape[1]] / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)[:, : p.shape[1]]
    loss = -(p * q.log()).sum(-1)
    loss.sum().backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def stored_rows(student: Tensor, stored: AnswerLogits, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = stored_loss(student, stored, temperature)
    loss.sum().backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@pytest.mark.parametrize("student_vocab", [40, 30, 47], ids=["equal", "shorter", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_stored_loss_and_gradient_equal_the_dense_ones_row_by_row(
    student_vocab: int, temperature: float
) -> None:
    teacher, student = random_logits(6, 40, seed=0), random_logits(6, student_vocab, seed=1)
    loss, grad = stored_rows(student, store(teacher, top_k=40), temperature)
    expected_loss, expected_grad = dense_rows(student, teacher, temperature)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    assert relative(grad, expected_grad) < 2e-3
    dense = logit_distillation_loss(student, teacher, temperature)
    assert float(loss.mean()) == pytest.approx(float(dense), rel=1e-3)


NUM_REPEATS = 20_000


@cache
def many_draws(scale: float, num_tail_samples: int, temperatures: tuple[float, ...] = ()) -> AnswerLogits:
    """What is stored of `random_logits(1, 60, seed=2, scale=scale)` under many independent draws."""
    addresses = torch.rand(NUM_REPEATS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    teacher = random_logits(1, 60, seed=2, scale=scale).expand(NUM_REPEATS, -1)
    number = dict.fromkeys(("num_tail_samples", "num_tempered_samples"), num_tail_samples)
    return store(teacher, addresses, top_k=6, temperatures=temperatures, **number)


def repeated(stored: AnswerLogits, student: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Losses and gradients of one row under `many_draws`."""
    return stored_rows(student.expand(NUM_REPEATS, -1), stored, temperature)


def assert_mean_is(samples: Tensor, expected: Tensor, rounding: float) -> None:
    """Within five standard errors, and the rounding of stored numbers."""
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - expected).abs() <= 5 * error + rounding).all())


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0], ids=["flat", "medium", "peaked"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_tail_samples", [1, 3])
def test_loss_and_gradient_equal_the_dense_ones_in_expectation_over_the_draws(
    scale: float, temperature: float, num_tail_samples: int
) -> None:
    teacher, student = random_logits(1, 60, seed=2, scale=scale), random_logits(1, 60, seed=3)
    losses, grads = repeated(many_draws(scale, num_tail_samples, (2.0,)), student, temperature)
    expected_loss, expected_grad = dense_rows(student, teacher, temperature)
    assert_mean_is(losses, expected_loss[0], rounding=2e-3)
    assert_mean_is(grads, expected_grad[0], rounding=5e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_tail_samples", [1, 3])
def test_the_variance_of_the_gradient_is_the_stated_one(num_tail_samples: int, temperature: float) -> None:
    teacher, student = random_logits(1, 60, seed=2, scale=1.0), random_logits(1, 60, seed=3)
    _, grads = repeated(many_draws(1.0, num_tail_samples, (2.0,)), student, temperature)
    probs = (teacher[0] / temperature).softmax(-1).sort(descending=True).values
    tail = probs[6:].sum()
    rest = (num_tail_samples * probs[6:] / tail) % 1
    expected = (tail / num_tail_samples / temperature) ** 2 * (rest * (1 - rest)).sum()
    assert float(grads.var(0).sum()) == pytest.approx(float(expected), rel=0.02)
    assert float(expected) <= float(tail**2) / num_tail_samples / temperature**2


def test_a_student_that_equals_its_teacher_has_no_gradient_in_expectation() -> None:
    teacher = random_logits(1, 60, seed=2)
    _, grads = repeated(many_draws(2.0, 2), teacher)
    assert float(grads.norm(dim=-1).mean()) > 0.02
    assert_mean_is(grads, torch.zeros(60, dtype=torch.float64), rounding=3e-4)


def test_a_padded_student_vocabulary_learns_that_the_teacher_has_no_such_tokens() -> None:
    teacher, student = random_logits(1, 60, seed=2), random_logits(1, 75, seed=3)
    losses, grads = repeated(many_draws(2.0, 2), student)
    expected_loss, expected_grad = dense_rows(student, teacher)
    assert_mean_is(losses, expected_loss[0], rounding=2e-3)
    assert_mean_is(grads, expected_grad[0], rounding=5e-4)
    assert bool((expected_grad[0, 60:] > 0).all())


def test_a_shorter_student_vocabulary_gives_the_cut_teachers_gradient_but_for_its_stated_length() -> None:
    teacher, student = random_logits(1, 60, seed=2), random_logits(1, 45, seed=3)
    _, grads = repeated(many_draws(2.0, 2), student)
    _, expected_grad = dense_rows(student, teacher)
    probs = teacher[0].softmax(-1)
    kept = probs.topk(6).indices
    assert bool((kept >= 45).any()), "a kept id is cut too"
    tail = probs.scatter(0, kept, 0)
    share = tail[45:].sum() / (tail.sum() + probs[kept[kept < 45]].sum())
    assert float(share) > 0.02
    assert_mean_is(grads, expected_grad[0] * (1 - share), rounding=5e-4)


def test_a_row_of_which_the_student_knows_no_token_has_no_loss() -> None:
    teacher = torch.full((1, 9), -torch.inf)
    teacher[0, 7:] = 0.0
    for k in (2, 9):
        loss, grad = stored_rows(torch.zeros(1, 5), store(teacher, top_k=k))
        assert loss.item() == 0
        assert torch.equal(grad, torch.zeros(1, 5))


def test_the_gradient_is_finite_when_the_student_is_sure() -> None:
    teacher = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    stored = store(teacher, top_k=4)
    student = torch.zeros(3, 30)
    student[torch.arange(3), stored.ids_RK[:, 0]] = 200.0
    loss, grad = stored_rows(student, stored)
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(grad).all())


def test_next_token_loss_equals_minus_log_softmax() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    answers = torch.tensor([0, 3, 8, 2])
    expected = -logits.double().log_softmax(-1)[torch.arange(4), answers]
    found = next_token_loss(logits, answers)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


BUCKETED: tuple[Divergence, ...] = ("reverse", "symmetric", "jensen_shannon")
every_divergence = pytest.mark.parametrize("divergence", BUCKETED)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Where the second is 0 and the first is not, as if it were e^-50."""
    terms = a * (a.clamp(min=1e-300).log() - b.clamp(min=math.exp(-50)).log())
    return terms.sum(-1)


def compared_by_the_book(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """`[R]` of two distributions in the last axis, float64."""
    middle = (p + q) / 2
    return {
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2,
    }[divergence]


def bucketed(student: Tensor, teacher: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's k likeliest ids that the student knows, and all else as one, of both."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    rows = []
    for p_V, q_V, ids in zip(p, q, teacher.topk(top_k).indices, strict=True):
        known = ids[ids < len(q_V)]
        of_teacher = torch.cat([p_V[known], (1 - p_V[ids].sum())[None]])
        rows.append((of_teacher / of_teacher.sum(), torch.cat([q_V[known], (1 - q_V[known].sum())[None]])))
    width = top_k + 1
    pads = [[torch.nn.functional.pad(side, (width - len(side), 0)) for side in row] for row in rows]
    return torch.stack([row[0] for row in pads]), torch.stack([row[1] for row in pads])


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_vocab", [60, 45, 75], ids=["equal", "shorter", "padded"])
def test_divergences_over_the_stored_support_equal_a_textbook_version_and_its_gradient(
    divergence: Divergence, temperature: float, student_vocab: int
) -> None:
    teacher, student = random_logits(8, 60, seed=2), random_logits(8, student_vocab, seed=3)
    if student_vocab < 60:
        assert bool((teacher.topk(6).indices >= student_vocab).any()), "a kept id is cut too"
    stored = store(teacher, top_k=6, temperatures=(2.0,))
    student.requires_grad_()
    found = stored_loss(student, stored, temperature, divergence)
    expected = compared_by_the_book(*bucketed(student, teacher, 6, temperature), divergence)
    # The codec rounds to 11 bits.
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    assert relative(gradient, expected_gradient) < 3e-3


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_stored_divergences_are_those_of_whole_distributions(
    divergence: Divergence, temperature: float
) -> None:
    teacher, student = random_logits(6, 40, seed=0), random_logits(6, 40, seed=1).requires_grad_()
    found = stored_loss(student, store(teacher, top_k=40), temperature, divergence)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = compared_by_the_book(p, q, divergence)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    assert relative(gradient, expected_gradient) < 2e-3


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_vocab", [60, 45, 75], ids=["equal", "shorter", "padded"])
def test_the_gradient_of_a_divergence_is_that_of_finite_differences(
    divergence: Divergence, temperature: float, student_vocab: int
) -> None:
    stored = store(random_logits(4, 60, seed=2), top_k=6, temperatures=(2.0,))
    student = random_logits(4, student_vocab, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: stored_loss(z, stored, temperature, divergence), student)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [6, 60], ids=["support", "whole vocabulary"])
def test_divergences_are_zero_with_zero_gradient_row_by_row_where_the_student_says_what_is_stored(
    divergence: Divergence, temperature: float, top_k: int
) -> None:
    stored = store(random_logits(4, 60, seed=2), top_k=top_k, num_tail_samples=3, temperatures=(2.0,))
    kept, tail, _ = stored.probabilities(temperature)
    # The tail may be spread as one likes.
    others = torch.rand(4, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = others.scatter(1, stored.ids_RK, 0.0)
    others = others / others.sum(-1, keepdim=True).clamp(min=1e-9) * tail[:, None]
    probs = others.scatter(1, stored.ids_RK, kept.double())
    student = (probs.log() * temperature).requires_grad_()
    loss = stored_loss(student, stored, temperature, divergence)
    loss.sum().backward()
    # What is stored is float32, and sums to 1 that far.
    assert float(loss.detach().abs().max()) < 1e-6
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@every_divergence
def test_what_is_stored_bounds_the_divergence_of_whole_distributions_from_below(divergence: Divergence) -> None:
    teacher, student = random_logits(50, 60, seed=2), random_logits(50, 60, seed=3)
    whole = compared_by_the_book(teacher.softmax(-1), student.softmax(-1), divergence)
    found = stored_loss(student, store(teacher, top_k=6), 1.0, divergence)
    assert bool((found <= whole + 1e-3).all())
    assert bool((found > 0).all())


@every_divergence
def test_divergences_and_their_gradients_are_finite_when_either_side_is_sure(divergence: Divergence) -> None:
    teacher = torch.full((2, 30), -torch.inf)
    teacher[0, 4] = teacher[1, 5] = 0.0
    for top_k in (1, 3, 30):
        for height in (0.0, 200.0):
            student = torch.zeros(2, 35)
            student[:, 4] = height
            student.requires_grad_()
            loss = stored_loss(student, store(teacher, top_k=top_k), 1.0, divergence)
            loss.sum().backward()
            assert student.grad is not None
            assert bool(torch.isfinite(loss).all())
            assert bool(torch.isfinite(student.grad).all())


def test_rows_of_a_teacher_are_those_of_its_parts() -> None:
    stored = store(random_logits(9, 60, seed=2), top_k=6)
    whole, student = teacher_rows(stored, 60, 1.0), random_logits(9, 60, seed=3)
    for divergence in ("forward", *BUCKETED):
        parts = [whole[rows].loss(student[rows], divergence) for rows in (slice(0, 4), slice(4, 9))]
        assert torch.equal(torch.cat(parts), whole.loss(student, divergence))
