"""Attention losses: the golden vectors, textbook versions in float64, padding, gradients by finite differences."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.student.losses.attention import attention_alignment_loss, below_sink_threshold, matched_loss
from stages.student.stage_config import AttentionLoss

GOLDEN = Path(__file__).parents[3] / "golden"
KINDS: tuple[AttentionLoss, ...] = ("cosine", "kl", "mse")

every_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without_sinks = pytest.mark.parametrize("sink_mask", [True, False], ids=["sinks masked", "sinks left in"])


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


def random_maps(*shape: int, seed: int) -> Tensor:
    """float64 causal maps whose rows sum to 0.8."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    future = torch.ones(shape[-2:]).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1) * 0.8


def pooled_by_the_book(a: Tensor, b: Tensor, *, sink_mask: bool) -> tuple[list[float], list[float]]:
    """METHOD's a and b with loops."""
    n = len(a)
    a_limit, b_limit = (float(m.mean() + m.std()) if sink_mask else math.inf for m in (a, b))
    pooled: tuple[list[float], list[float]] = ([], [])
    for key in range(n):
        kept = [
            query for query in range(n) if a[query, key] <= a_limit and b[query, key] <= b_limit and b[query, key] > 0
        ]
        for means, which in zip(pooled, (a, b), strict=True):
            means.append(sum(float(which[query, key]) for query in kept) / max(1, len(kept)))
    return pooled


def compared_by_the_book(a: list[float], b: list[float], kind: AttentionLoss) -> float:
    if kind == "cosine":
        dot, length_a, length_b = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
        return 1 - dot / math.sqrt(length_a * length_b)
    if kind == "mse":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    shares = [(x / sum(a), y / sum(b)) for x, y in zip(a, b, strict=True)]
    return sum(y * math.log(y / x) for x, y in shares if y > 0)


@every_kind
@with_and_without_sinks
def test_each_loss_equals_a_textbook_version_in_float64(kind: AttentionLoss, sink_mask: bool) -> None:
    student, teacher = random_maps(3, 12, 12, seed=1), random_maps(3, 12, 12, seed=2)
    keep = (teacher > 0) & (below_sink_threshold(teacher) if sink_mask else True)
    found = matched_loss(student, teacher, keep, kind=kind, sink_mask=sink_mask)
    expected = [
        compared_by_the_book(*pooled_by_the_book(a, b, sink_mask=sink_mask), kind)
        for a, b in zip(student, teacher, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@every_kind
def test_the_loss_of_several_layers_is_their_sum_and_the_mean_of_the_samples(kind: AttentionLoss) -> None:
    student, teacher = random_maps(2, 3, 12, 12, seed=1), random_maps(2, 3, 12, 12, seed=2)
    expected = sum(
        compared_by_the_book(*pooled_by_the_book(student[layer, sample], teacher[layer, sample], sink_mask=True), kind)
        for layer in range(2)
        for sample in range(3)
    )
    assert float(attention_alignment_loss(student, teacher, kind)) == pytest.approx(expected / 3, rel=1e-12)


def test_the_mask_changes_what_is_compared() -> None:
    student, teacher = random_maps(1, 12, 12, seed=1), random_maps(1, 12, 12, seed=2)
    masked = matched_loss(student, teacher, below_sink_threshold(teacher) & (teacher > 0))
    assert abs(float(masked - matched_loss(student, teacher, teacher > 0, sink_mask=False))) > 0.01


@every_kind
@with_and_without_sinks
def test_loss_and_gradient_are_zero_for_equal_maps(kind: AttentionLoss, sink_mask: bool) -> None:
    teacher = random_maps(2, 16, 16, seed=5)
    keep = (teacher > 0) & (below_sink_threshold(teacher) if sink_mask else True)
    student = teacher.clone().requires_grad_()
    loss = matched_loss(student, teacher, keep, kind=kind, sink_mask=sink_mask)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert float(loss.detach().abs().max()) < 1e-15
    assert float(gradient.abs().max()) < 1e-14


@every_kind
@with_and_without_sinks
def test_the_gradient_is_that_of_finite_differences(kind: AttentionLoss, sink_mask: bool) -> None:
    student, teacher = random_maps(2, 7, 7, seed=1).requires_grad_(), random_maps(2, 7, 7, seed=2)
    keep = (teacher > 0) & (below_sink_threshold(teacher) if sink_mask else True)
    counts = torch.tensor([7, 7])
    assert torch.autograd.gradcheck(
        lambda maps: matched_loss(maps, teacher, keep, counts, kind=kind, sink_mask=sink_mask), student
    )


@every_kind
def test_padding_changes_neither_the_loss_nor_the_threshold(kind: AttentionLoss) -> None:
    student, teacher = random_maps(2, 9, 9, seed=1), random_maps(2, 9, 9, seed=2)
    keep = below_sink_threshold(teacher) & (teacher > 0)
    padded = [torch.nn.functional.pad(t, (0, 5, 0, 5)) for t in (student, teacher, keep)]
    counts = torch.tensor([9, 9])
    expected = matched_loss(student, teacher, keep, kind=kind)
    torch.testing.assert_close(matched_loss(*padded, counts, kind=kind), expected)
    inside = below_sink_threshold(padded[0], counts)[:, :9, :9]
    assert torch.equal(inside, below_sink_threshold(student))


@every_kind
def test_a_sample_without_an_image_has_no_loss_and_no_gradient(kind: AttentionLoss) -> None:
    student = torch.zeros(1, 4, 4, requires_grad=True)
    loss = matched_loss(student, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool(), torch.tensor([0]), kind=kind)
    loss.sum().backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(1, 4, 4))


@every_kind
def test_an_image_of_one_token_and_a_key_that_the_student_ignores_have_finite_losses(kind: AttentionLoss) -> None:
    one = torch.full((1, 1, 1), 0.3)
    assert float(matched_loss(one, one, one > 0, kind=kind)) == pytest.approx(0, abs=1e-7)
    student, teacher = random_maps(1, 6, 6, seed=1).float(), random_maps(1, 6, 6, seed=2).float()
    # As after a softmax that underflowed.
    student[:, :, 2] = 0.0
    student.requires_grad_()
    loss = matched_loss(student, teacher, teacher > 0, kind=kind)
    loss.sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(student.grad).all())
