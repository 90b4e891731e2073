"""Losses between two tokenizers against textbook versions on dense float64 distributions."""

import pytest
import torch
from torch import Tensor

from stages.student.losses.across_tokenizers import SPACINGS, AlignedRows, SharedTokens, sorted_probability_loss
from stages.student.losses.head import answer_losses
from stages.student.losses.logits import TeacherRows, logit_distillation_loss, next_token_loss, teacher_rows
from storage.codecs.answer_logits import AnswerLogits, AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses

TEACHER_VOCAB = 40


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def store(teacher: Tensor, **settings: object) -> AnswerLogits:
    codec = LogitCodecConfig.model_validate({"vocab_size": teacher.shape[1], "name": "float16", **settings})
    records = AnswerLogitsCodec(codec).encode(teacher, row_addresses("key", len(teacher)))
    return AnswerLogitsCodec(codec).decode(records)


def rows_of(teacher: Tensor, temperature: float = 1.0, **settings: object) -> TeacherRows:
    return teacher_rows(store(teacher, **settings), teacher.shape[1], temperature)


def dense_uld(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`[R]`, as the paper has it: sort, pad to one length, add up the distances."""
    p, q = (rows.div(temperature).softmax(-1).sort(dim=-1, descending=True).values for rows in (teacher, student))
    length = max(p.shape[1], q.shape[1])
    p, q = (torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1])], dim=1) for rows in (p, q))
    return (p - q).abs().sum(-1)


def dense_shared(student: Tensor, teacher: Tensor, pairs: dict[int, int], temperature: float = 1.0) -> Tensor:
    """`[R]`: -sum over pairs of p(teacher's id) times the log of the student's share among the pairs."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    theirs = sorted(set(pairs.values()))
    losses = []
    for p_V, q_V in zip(p, q, strict=True):
        total = q_V[theirs].sum()
        losses.append(-sum(p_V[ours] * (q_V[own] / total).log() for ours, own in pairs.items()))
    return torch.stack(losses)


def with_gradient(loss_of, student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = loss_of(student)
    # Rows of different weight, or a wrong sum of gradients over rows would not be seen.
    (loss * torch.arange(1, len(loss) + 1)).sum().backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def shared_of(pairs: dict[int, int], teacher_vocab: int = TEACHER_VOCAB) -> SharedTokens:
    found = torch.full((teacher_vocab,), -1)
    for ours, own in pairs.items():
        found[ours] = own
    return SharedTokens.of_maps([found] * len(SPACINGS))


@pytest.mark.parametrize("student_vocab", [40, 25, 70])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sorted_probabilities_of_whole_vocabularies_have_the_papers_loss_and_its_gradient(
    student_vocab: int, temperature: float
) -> None:
    teacher, student = random_logits(6, 40, seed=0), random_logits(6, student_vocab, seed=1)
    rows = rows_of(teacher, temperature, top_k=40)
    loss, grad = with_gradient(lambda logits: sorted_probability_loss(logits, rows), student)
    expected, expected_grad = with_gradient(lambda logits: dense_uld(logits, teacher, temperature), student)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=2e-3)
    assert relative(grad, expected_grad) < 5e-3


@pytest.mark.parametrize("top_k", [4, 12, 30])
def test_of_a_truncated_teacher_they_are_off_by_less_than_twice_the_smaller_tail(top_k: int) -> None:
    teacher, student = random_logits(200, 60, seed=2), random_logits(200, 45, seed=3, scale=1.5)
    rows = rows_of(teacher, top_k=top_k, num_tail_samples=4)
    loss, expected = sorted_probability_loss(student, rows), dense_uld(student, teacher)
    tails = [
        logits.softmax(-1).sort(dim=-1, descending=True).values[:, top_k:].sum(-1) for logits in (teacher, student)
    ]
    missing, bound = expected - loss, 2 * torch.minimum(*tails)
    assert bool((missing > -2e-3).all())
    assert bool((missing < bound + 2e-3).all())
    assert float(missing.max()) > 0.01


@pytest.mark.parametrize("top_k", [5, 40])
def test_sorted_probabilities_that_are_equal_cost_nothing_whatever_the_ids_are(top_k: int) -> None:
    teacher = random_logits(6, 40, seed=4)
    rows = rows_of(teacher, top_k=top_k)
    others = teacher[:, torch.randperm(40, generator=torch.Generator().manual_seed(5))]
    assert float(sorted_probability_loss(others, rows).max()) < 2e-3
    assert float(sorted_probability_loss(-teacher, rows).min()) > 0.1


PAIRS = {3: 0, 4: 7, 9: 2, 11: 3, 20: 29, 21: 29, 39: 11}
"""Two of the teacher's ids are one token of the student."""


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shared_tokens_have_the_loss_and_gradient_of_the_dense_formula(temperature: float) -> None:
    teacher, student = random_logits(6, 40, seed=6), random_logits(6, 30, seed=7)
    rows, shared = rows_of(teacher, temperature, top_k=40), shared_of(PAIRS)
    loss, grad = with_gradient(lambda logits: shared.loss(logits, rows, 0), student)
    expected, expected_grad = with_gradient(lambda logits: dense_shared(logits, teacher, PAIRS, temperature), student)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-4)
    assert relative(grad, expected_grad) < 3e-3
    untouched = [number for number in range(30) if number not in PAIRS.values()]
    assert not bool(grad[:, untouched].any())


def test_tail_samples_make_the_loss_on_shared_tokens_right_in_expectation() -> None:
    num_repeats = 20_000
    teacher, student = random_logits(1, 40, seed=8), random_logits(1, 30, seed=9)
    repeated = teacher.expand(num_repeats, -1)
    codec = LogitCodecConfig.model_validate({"vocab_size": 40, "name": "float16", "top_k": 3, "num_tail_samples": 4})
    addresses = torch.arange(num_repeats, dtype=torch.float64) / num_repeats
    stored = AnswerLogitsCodec(codec).decode(AnswerLogitsCodec(codec).encode(repeated, addresses))
    loss_R = shared_of(PAIRS).loss(student.expand(num_repeats, -1), teacher_rows(stored, 40, 1.0), 0)
    assert float(loss_R.std()) > 0.01
    assert float(loss_R.mean()) == pytest.approx(float(dense_shared(student, teacher, PAIRS)), rel=5e-3)


def test_of_one_tokenizer_shared_tokens_have_the_published_loss() -> None:
    teacher, student = random_logits(6, 40, seed=10), random_logits(6, 40, seed=11)
    shared = shared_of({number: number for number in range(40)})
    loss = shared.loss(student, rows_of(teacher, top_k=40), 0).mean()
    assert float(loss) == pytest.approx(float(logit_distillation_loss(student, teacher)), rel=1e-3)


def test_tokenizers_without_a_token_in_common_learn_nothing() -> None:
    teacher, student = random_logits(3, 40, seed=12), random_logits(3, 30, seed=13).requires_grad_()
    assert not bool(shared_of({}).loss(student, rows_of(teacher, top_k=40), 0).any())


@pytest.mark.parametrize("way", ["uld", "shared"])
@pytest.mark.parametrize("logits_at_once", [90, 10**9], ids=["part by part", "at once"])
def test_rows_that_are_not_compared_have_their_lm_loss_alone(way: str, logits_at_once: int) -> None:
    teacher, hidden = random_logits(4, 40, seed=14), random_logits(7, 5, seed=15)
    weight, answers = random_logits(5, 30, seed=16), torch.arange(7)
    at, spacing = [1, 2, 5, 6], torch.tensor([0, 1, 0, 2])
    maps = [{3: 0, 4: 7}, {5: 1, 6: 2}, {8: 9, 9: 10, 10: 3}]
    found = torch.full((3, 40), -1)
    for number, pairs in enumerate(maps):
        found[number, list(pairs)] = torch.tensor(list(pairs.values()))
    number_R = torch.full((7,), -1).index_put((torch.tensor(at),), torch.arange(4))
    shared = SharedTokens.of_maps(list(found)) if way == "shared" else None
    rows = AlignedRows(rows_of(teacher, top_k=40), spacing, number_R, shared)

    def found_loss(weight: Tensor) -> Tensor:
        lm, kd = answer_losses(
            lambda h: h @ weight, hidden, answers, rows, vocab_size=30, logits_at_once=logits_at_once
        )
        assert kd is not None
        return torch.cat([lm, kd])

    def expected_loss(weight: Tensor) -> Tensor:
        logits = hidden @ weight
        kd = torch.zeros(7, dtype=torch.float64)
        for number, row in enumerate(at):
            one, other = logits[row : row + 1], teacher[number : number + 1]
            loss = dense_uld(one, other) if way == "uld" else dense_shared(one, other, maps[int(spacing[number])])
            kd = kd.index_put((torch.tensor([row]),), loss)
        return torch.cat([next_token_loss(logits, answers), kd])

    (loss, grad), (expected, expected_grad) = (with_gradient(of, weight) for of in (found_loss, expected_loss))
    torch.testing.assert_close(loss, expected, rtol=3e-3, atol=2e-3)
    assert relative(grad, expected_grad) < 3e-3
