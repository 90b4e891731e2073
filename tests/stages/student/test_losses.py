"""Losses: the golden vectors, textbook versions in float64, and stored against dense."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.student.losses import (
    attention_alignment_loss,
    below_sink_threshold,
    logit_distillation_loss,
    next_token_loss,
    pooled_cosine_loss,
    stored_logit_distillation_loss,
)
from storage.codecs.answer_logits import AnswerLogits, top_k_logprobs

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
    expected = pooled_cosine_loss(student, teacher, keep)
    torch.testing.assert_close(pooled_cosine_loss(*padded, counts), expected)
    inside = below_sink_threshold(padded[0], counts)[:, :9, :9]
    assert torch.equal(inside, below_sink_threshold(student))


def test_a_sample_without_an_image_has_no_loss_and_no_gradient() -> None:
    student = torch.zeros(1, 4, 4, requires_grad=True)
    loss = pooled_cosine_loss(student, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool(), torch.tensor([0]))
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


def store_whole(teacher: Tensor) -> AnswerLogits:
    return top_k_logprobs(teacher, teacher.shape[1])


def test_stored_logit_loss_equals_the_dense_one_when_the_whole_vocabulary_is_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(6, 40, generator=generator) * 2 for _ in range(2))
    stored = stored_logit_distillation_loss(student, store_whole(teacher)).mean()
    assert float(stored) == pytest.approx(float(logit_distillation_loss(student, teacher)), rel=1e-3)


def test_stored_logit_loss_with_a_tail_equals_a_textbook_bucket_version() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(6, 100, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    stored = top_k_logprobs(teacher, 8)
    found = stored_logit_distillation_loss(student, stored)
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(6):
        ids = teacher[row].topk(8).indices
        expected = -sum(p[row, i] * q[row, i].log() for i in ids)
        expected -= (1 - p[row, ids].sum()) * (1 - q[row, ids].sum()).log()
        assert float(found[row]) == pytest.approx(float(expected), rel=2e-3)


def test_stored_logit_loss_drops_ids_past_a_shorter_vocabulary_and_renormalises() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(6, 50, generator=generator), torch.randn(6, 40, generator=generator)
    stored = stored_logit_distillation_loss(student, store_whole(teacher)).mean()
    assert float(stored) == pytest.approx(float(logit_distillation_loss(student, teacher)), rel=1e-3)


def test_stored_logit_gradient_is_finite_when_the_student_is_sure() -> None:
    teacher = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    stored = top_k_logprobs(teacher, 4)
    student = torch.zeros(3, 30)
    student[:, 0] = 200.0
    student[torch.arange(3), stored.ids_RK[:, 0].long()] = 200.0
    student.requires_grad_()
    stored_logit_distillation_loss(student, stored).sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_next_token_loss_equals_minus_log_softmax() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([0, 3, 8, 2])
    expected = -logits.double().log_softmax(-1)[torch.arange(4), answers]
    torch.testing.assert_close(next_token_loss(logits, answers).double(), expected, rtol=1e-5, atol=1e-6)
