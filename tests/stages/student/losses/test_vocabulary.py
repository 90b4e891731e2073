"""Sums over vocabulary logits: against textbook versions in float64, gradients, and what is never in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.student.losses.vocabulary import sparse_cross_entropy, support_probabilities

ROWS = 70  # more than are converted at a time


def random_logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def distinct_ids(num_rows: int, vocab: int, count: int) -> Tensor:
    return torch.rand(num_rows, vocab, generator=torch.Generator().manual_seed(7)).argsort(-1)[:, :count]


def repeated_ids_and_weights() -> tuple[Tensor, Tensor]:
    """An id that comes twice, weights that do not sum to 1."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 11, (ROWS, 5), generator=generator)
    ids[:, 4] = ids[:, 0]
    return ids, torch.rand(ROWS, 5, generator=generator, dtype=torch.float64)


def test_sparse_cross_entropy_has_the_gradient_of_its_value() -> None:
    student = random_logits(ROWS, 11, seed=4).requires_grad_()
    ids, weights = repeated_ids_and_weights()
    expected = -(weights * (student / 1.5).log_softmax(-1).gather(1, ids)).sum(-1)
    torch.testing.assert_close(sparse_cross_entropy(student, ids, weights, 1.5), expected)
    assert torch.autograd.gradcheck(lambda z: sparse_cross_entropy(z, ids, weights, 1.5), student)


def test_several_weights_over_the_same_ids_give_several_losses_with_the_sum_of_their_gradients() -> None:
    student = random_logits(ROWS, 11, seed=4).requires_grad_()
    ids, weights = repeated_ids_and_weights()
    several = torch.stack([weights, weights.flip(1) * 0.3])
    found = sparse_cross_entropy(student, ids, several, 1.5)
    assert found.shape == (2, ROWS)
    torch.testing.assert_close(found, torch.stack([sparse_cross_entropy(student, ids, w, 1.5) for w in several]))
    assert torch.autograd.gradcheck(lambda z: sparse_cross_entropy(z, ids, several, 1.5), student)


def test_support_probabilities_are_those_of_the_softmax_with_their_gradient() -> None:
    student, ids = random_logits(ROWS, 11, seed=4).requires_grad_(), distinct_ids(ROWS, 11, 4)
    probs, rest = support_probabilities(student, ids, 1.5)
    expected = (student / 1.5).softmax(-1)
    torch.testing.assert_close(probs, expected.gather(1, ids))
    torch.testing.assert_close(rest, expected.scatter(1, ids, 0).sum(-1))
    assert torch.autograd.gradcheck(lambda z: support_probabilities(z, ids, 1.5), student)


def test_ids_past_the_vocabulary_have_no_probability_and_leave_the_last_id_alone() -> None:
    student, ids = random_logits(ROWS, 11, seed=4).requires_grad_(), distinct_ids(ROWS, 11, 4)
    known = support_probabilities(student, ids)
    probs, rest = support_probabilities(student, torch.cat([ids, torch.full((ROWS, 2), 11)], dim=1))
    assert torch.equal(probs[:, 4:], torch.zeros(ROWS, 2, dtype=torch.float64))
    torch.testing.assert_close(probs[:, :4], known[0])
    torch.testing.assert_close(rest, known[1])
    past = torch.tensor([[0, 13, 12]]).expand(ROWS, -1)
    assert torch.autograd.gradcheck(lambda z: support_probabilities(z, past), student)


def test_the_rest_of_a_sure_student_has_its_full_precision() -> None:
    student = torch.tensor([[30.0, 0.0, 1.0, 2.0]])
    _, rest = support_probabilities(student, torch.tensor([[0]]))
    exact = student.double().softmax(-1)[:, 1:].sum()
    assert float(rest) == pytest.approx(float(exact), rel=1e-5)


def test_a_support_that_is_the_whole_vocabulary_leaves_nothing() -> None:
    student = random_logits(3, 5, seed=0).requires_grad_()
    ids = torch.arange(5).expand(3, -1)
    probs, rest = support_probabilities(student, ids)
    assert torch.equal(rest, torch.zeros(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(probs.square().sum() + rest.sum(), student)
    (expected,) = torch.autograd.grad(student.softmax(-1).square().sum(), student)
    torch.testing.assert_close(gradient, expected)


Sums = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    "sums",
    [
        lambda student, ids: sparse_cross_entropy(student, ids, torch.ones(ids.shape)),
        lambda student, ids: support_probabilities(student, ids)[1],
    ],
    ids=["cross entropy", "support"],
)
def test_no_float32_copy_of_all_logits_is_made_or_kept(sums: Sums) -> None:
    rows, vocab = 1000, 2000
    student = torch.randn(rows, vocab).bfloat16().requires_grad_()
    ids = torch.zeros(rows, 1, dtype=torch.long)
    sizes: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    with Watched():
        sums(student, ids).sum().backward()
    assert max(sizes) == 64 * vocab
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
