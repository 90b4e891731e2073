"""Attention losses: the golden vectors, textbook versions in float64, padding, gradients by finite differences."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.student.losses.attention import (
    answer_loss,
    attention_alignment_loss,
    below_sink_threshold,
    matched_loss,
)
from stages.student.stage_config import AttentionLoss

GOLDEN = Path(__file__).parents[3] / "golden"
KINDS: tuple[AttentionLoss, ...] = ("cosine", "kl", "mse", "row_kl")

SMALL = 1e-9
"""Far below the smallest attention, whose logarithm is taken."""

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


def loss_by_the_book(a: Tensor, b: Tensor, kind: AttentionLoss, *, sink_mask: bool) -> float:
    """Of one pair of maps, with loops."""
    if kind != "row_kl":
        return compared_by_the_book(*pooled_by_the_book(a, b, sink_mask=sink_mask), kind)
    a_limit, b_limit = (float(m.mean() + m.std()) if sink_mask else math.inf for m in (a, b))
    found = []
    for query in range(len(a)):
        kept = [k for k in range(len(a)) if a[query, k] <= a_limit and b[query, k] <= b_limit and b[query, k] > 0]
        if len(kept) > 1:
            found.append(
                compared_by_the_book([float(a[query, k]) for k in kept], [float(b[query, k]) for k in kept], "kl")
            )
    return sum(found) / len(found)


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
    expected = [loss_by_the_book(a, b, kind, sink_mask=sink_mask) for a, b in zip(student, teacher, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@every_kind
def test_the_loss_of_several_layers_is_their_sum_and_the_mean_of_the_samples(kind: AttentionLoss) -> None:
    student, teacher = random_maps(2, 3, 12, 12, seed=1), random_maps(2, 3, 12, 12, seed=2)
    expected = sum(
        loss_by_the_book(student[layer, sample], teacher[layer, sample], kind, sink_mask=True)
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
        lambda maps: matched_loss(maps, teacher, keep, counts, kind=kind, sink_mask=sink_mask), student, eps=SMALL
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


def test_a_row_of_one_key_is_no_row_of_the_row_wise_mean() -> None:
    teacher = random_maps(1, 5, 5, seed=2)
    student = random_maps(1, 5, 5, seed=1)
    keep = torch.zeros(1, 5, 5, dtype=torch.bool)
    keep[0, 1:, 0] = True
    none = matched_loss(student, teacher, keep, kind="row_kl", sink_mask=False)
    keep[0, 4, 1:4] = True
    one = matched_loss(student, teacher, keep, kind="row_kl", sink_mask=False)
    rows = [student[0, 4, :4].tolist(), teacher[0, 4, :4].tolist()]
    assert none.item() == 0
    assert one.item() == pytest.approx(compared_by_the_book(*rows, "kl"), rel=1e-12)


def answers(seed: int) -> Tensor:
    """`[2, 3, 12]` float64 attention of 2 windows, 3 answers and 12 tokens, of which the last one sees two of three."""
    values = (
        torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).softmax(-1)
    )
    values[:, 2, 8:] = 0
    return values / 2


@every_kind
@with_and_without_sinks
def test_the_loss_of_answers_equals_a_textbook_version_in_float64(kind: AttentionLoss, sink_mask: bool) -> None:
    student, teacher = answers(1), answers(2)
    found = answer_loss(student, teacher, kind=kind, sink_mask=sink_mask)
    for window in range(2):
        for answer in range(3):
            a, b = student[window, answer], teacher[window, answer]
            a_limit, b_limit = (float(v.mean() + v.std()) if sink_mask else math.inf for v in (a, b))
            kept = [x <= a_limit and 0 < y <= b_limit for x, y in zip(a.tolist(), b.tolist(), strict=True)]
            vectors = [[x * keep for x, keep in zip(v.tolist(), kept, strict=True)] for v in (a, b)]
            expected = compared_by_the_book(*vectors, "kl" if kind == "row_kl" else kind)
            assert float(found[window, answer]) == pytest.approx(expected, rel=1e-12)


@every_kind
@with_and_without_sinks
def test_the_gradient_of_the_loss_of_answers_is_that_of_finite_differences(
    kind: AttentionLoss, sink_mask: bool
) -> None:
    student, teacher = answers(1).requires_grad_(), answers(2)
    assert torch.autograd.gradcheck(
        lambda own: answer_loss(own, teacher, kind=kind, sink_mask=sink_mask), student, eps=SMALL
    )


@every_kind
def test_equal_answers_have_no_loss_and_an_answer_that_sees_nothing_has_finite_gradients(kind: AttentionLoss) -> None:
    student, teacher = answers(1), answers(1)
    assert float(answer_loss(student, teacher, kind=kind).abs().max()) < 1e-15
    student[:, 1], teacher[:, 1] = 0, 0
    student = student.float().requires_grad_()
    loss = answer_loss(student, teacher, kind=kind)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


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
