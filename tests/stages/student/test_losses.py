"""Losses: the golden vectors, textbook versions in float64, and stored against dense."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.student.losses import (
    attention_alignment_loss,
    below_sink_threshold,
    logit_distillation_loss,
    next_token_loss,
    matched_loss,
    sparse_cross_entropy,
    stored_logit_distillation_loss,
)
from storage.codecs.answer_logits import (
    AnswerLogits,
    LogitCodecConfig,
    decode_logits,
    encode_logits,
    row_addresses,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["small", "medium", "peaked"])
def test_attention_loss_reproduces_the_golden_value_and_gradient(name: str) -> None:
    golden = load_file(GOLDEN / f"attention_loss_{name}.safetensors")
    student = golden["student"].requires_grad_()
    loss = attention_alignment_loss(student, golden["teacher"])
    loss.backward()
    assert relative(loss.detach(), golden["loss"][0]) < 1e-5
    assert student.grad is not None
    assert relative(student.grad, golden["student_grad"]) < 1e-4


@pytest.mark.parametrize("name", ["equal_vocab", "larger_teacher_vocab"])
def test_logit_loss_reproduces_the_golden_value_and_gradient(name: str) -> None:
    golden = load_file(GOLDEN / f"logit_loss_{name}.safetensors")
    student = golden["student"].requires_grad_()
    loss = logit_distillation_loss(student[golden["keep"]], golden["teacher"][golden["keep"]])
    loss.backward()
    assert relative(loss.detach(), golden["loss"][0]) < 1e-5
    assert student.grad is not None
    assert relative(student.grad, golden["student_grad"]) < 1e-4


def random_maps(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator) * 3
    future = torch.ones(shape[-2:]).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1) * 0.8


def textbook_attention_loss(student: Tensor, teacher: Tensor) -> float:
    """METHOD's formula with loops, in float64."""
    total = 0.0
    num_layers, num_samples, n, _ = student.shape
    for layer in range(num_layers):
        for sample in range(num_samples):
            a, b = student[layer, sample].double(), teacher[layer, sample].double()
            pooled = []
            for which in (a, b):
                means = []
                for key in range(n):
                    kept = [
                        float(which[query, key])
                        for query in range(n)
                        if a[query, key] <= a.mean() + a.std()
                        and b[query, key] <= b.mean() + b.std()
                        and b[query, key] > 0
                    ]
                    means.append(sum(kept) / max(1, len(kept)))
                pooled.append(torch.tensor(means, dtype=torch.float64))
            x, y = pooled
            total += 1 - float(x @ y / (x.norm() * y.norm()))
    return total / num_samples


def test_attention_loss_equals_a_textbook_version_in_float64() -> None:
    student, teacher = random_maps(2, 3, 12, 12, seed=1), random_maps(2, 3, 12, 12, seed=2)
    assert float(attention_alignment_loss(student, teacher)) == pytest.approx(
        textbook_attention_loss(student, teacher), rel=1e-5
    )


def test_attention_loss_is_zero_for_equal_maps() -> None:
    maps = random_maps(3, 2, 16, 16, seed=5)
    assert float(attention_alignment_loss(maps, maps)) == pytest.approx(0, abs=1e-6)


def test_padding_changes_neither_the_loss_nor_the_threshold() -> None:
    student, teacher = random_maps(2, 9, 9, seed=1), random_maps(2, 9, 9, seed=2)
    keep = below_sink_threshold(teacher) & (teacher > 0)
    padded = [torch.nn.functional.pad(t, (0, 5, 0, 5)) for t in (student, teacher, keep)]
    counts = torch.tensor([9, 9])
    expected = matched_loss(student, teacher, keep)
    torch.testing.assert_close(matched_loss(*padded, counts), expected)
    inside = below_sink_threshold(padded[0], counts)[:, :9, :9]
    assert torch.equal(inside, below_sink_threshold(student))


def test_a_sample_without_an_image_has_no_loss_and_no_gradient() -> None:
    student = torch.zeros(1, 4, 4, requires_grad=True)
    loss = matched_loss(student, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool(), torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(1, 4, 4))


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
    return decode_logits(codec, encode_logits(codec, teacher, addresses))


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
    loss = stored_logit_distillation_loss(student, stored, temperature)
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


def repeated(teacher: Tensor, student: Tensor, temperature: float = 1.0, **settings: object) -> tuple[Tensor, Tensor]:
    """Losses and gradients of one row under many independent draws."""
    addresses = torch.rand(NUM_REPEATS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    stored = store(teacher.expand(NUM_REPEATS, -1), addresses, **settings)
    return stored_rows(student.expand(NUM_REPEATS, -1), stored, temperature)


def assert_mean_is(samples: Tensor, expected: Tensor, rounding: float) -> None:
    """Within five standard errors, and the rounding of stored numbers."""
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - expected).abs() <= 5 * error + rounding).all())


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0], ids=["flat", "medium", "peaked"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_loss_and_gradient_equal_the_dense_ones_in_expectation_over_the_draws(
    scale: float, temperature: float, num_draws: int
) -> None:
    teacher, student = random_logits(1, 60, seed=2, scale=scale), random_logits(1, 60, seed=3)
    losses, grads = repeated(teacher, student, temperature, top_k=6, num_draws=num_draws, temperatures=(2.0,))
    expected_loss, expected_grad = dense_rows(student, teacher, temperature)
    assert_mean_is(losses, expected_loss[0], rounding=2e-3)
    assert_mean_is(grads, expected_grad[0], rounding=5e-4)


@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_variance_of_the_gradient_is_the_stated_one(num_draws: int) -> None:
    teacher, student = random_logits(1, 60, seed=2, scale=1.0), random_logits(1, 60, seed=3)
    _, grads = repeated(teacher, student, top_k=6, num_draws=num_draws)
    probs = teacher[0].softmax(-1).sort(descending=True).values
    tail = probs[6:].sum()
    rest = (num_draws * probs[6:] / tail) % 1
    expected = (tail / num_draws) ** 2 * (rest * (1 - rest)).sum()
    assert float(grads.var(0).sum()) == pytest.approx(float(expected), rel=0.02)
    assert float(expected) <= float(tail**2) / num_draws


def test_a_student_that_equals_its_teacher_has_no_gradient_in_expectation() -> None:
    teacher = random_logits(1, 60, seed=2)
    _, grads = repeated(teacher, teacher, top_k=6, num_draws=2)
    assert float(grads.norm(dim=-1).mean()) > 0.02
    assert_mean_is(grads, torch.zeros(60, dtype=torch.float64), rounding=3e-4)


def test_a_padded_student_vocabulary_learns_that_the_teacher_has_no_such_tokens() -> None:
    teacher, student = random_logits(1, 60, seed=2), random_logits(1, 75, seed=3)
    losses, grads = repeated(teacher, student, top_k=6, num_draws=2)
    expected_loss, expected_grad = dense_rows(student, teacher)
    assert_mean_is(losses, expected_loss[0], rounding=2e-3)
    assert_mean_is(grads, expected_grad[0], rounding=5e-4)
    assert bool((expected_grad[0, 60:] > 0).all())


def test_a_shorter_student_vocabulary_gives_the_cut_teachers_gradient_but_for_its_stated_length() -> None:
    teacher, student = random_logits(1, 60, seed=2), random_logits(1, 45, seed=3)
    _, grads = repeated(teacher, student, top_k=6, num_draws=2)
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


def test_sparse_cross_entropy_has_the_gradient_of_its_value() -> None:
    # More rows than are converted at a time, an id that comes twice, weights that do not sum to 1.
    student = random_logits(70, 11, seed=4).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 11, (70, 5), generator=generator)
    ids[:, 4] = ids[:, 0]
    weights = torch.rand(70, 5, generator=generator, dtype=torch.float64)
    expected = -(weights * (student / 1.5).log_softmax(-1).gather(1, ids)).sum(-1)
    torch.testing.assert_close(sparse_cross_entropy(student, ids, weights, 1.5), expected)
    assert torch.autograd.gradcheck(lambda z: sparse_cross_entropy(z, ids, weights, 1.5), student)


def test_no_float32_copy_of_all_logits_is_made_or_kept() -> None:
    rows, vocab = 1000, 2000
    student = torch.randn(rows, vocab).bfloat16().requires_grad_()
    ids, weights = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1)
    sizes: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    with Watched():
        sparse_cross_entropy(student, ids, weights).sum().backward()
    assert max(sizes) == 64 * vocab
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_next_token_loss_equals_minus_log_softmax() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    answers = torch.tensor([0, 3, 8, 2])
    expected = -logits.double().log_softmax(-1)[torch.arange(4), answers]
    found = next_token_loss(logits, answers)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
