"""Head and losses in parts: the values and gradients of one pass, and how many logits exist at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.student.losses.head import answer_losses
from stages.student.losses.logits import logit_distillation_loss, teacher_rows
from stages.student.stage_config import Divergence
from storage.codecs.answer_logits import AnswerLogits, AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses

ROWS, WIDTH, VOCAB = 13, 6, 40


def stored_rows(num_rows: int = ROWS, vocab: int = VOCAB, **settings: object) -> AnswerLogits:
    codec = LogitCodecConfig.model_validate(
        {"vocab_size": vocab, "name": "float16", "temperatures": (2.0,), **settings}
    )
    teacher = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    return AnswerLogitsCodec(codec).decode(AnswerLogitsCodec(codec).encode(teacher, row_addresses("key", num_rows)))


def exact(stored: AnswerLogits, vocab: int = VOCAB) -> Tensor:
    """The teacher's logits as stored, float64."""
    return torch.zeros(len(stored), vocab, dtype=torch.float64).scatter(1, stored.ids_RK, stored.logprobs_RK.double())


class Tied(nn.Module):
    """A head whose weight also embeds the tokens, as in small language models."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
        self.embedding.weight.requires_grad_(not frozen)

    def forward(self, hidden_Rd: Tensor) -> Tensor:
        return hidden_Rd @ self.embedding.weight.T


def by_the_book(
    model: Tied, answers: Tensor, stored: AnswerLogits, temperature: float, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Sums over rows, from whole logits, dense formulas and whole-vocabulary targets."""
    logits = model(model.embedding(answers).tanh())
    lm = nn.functional.cross_entropy(logits, answers, reduction="sum")
    teacher = exact(stored)
    p, q = (teacher / temperature).softmax(-1), (logits / temperature).softmax(-1)
    if divergence == "forward":
        return lm, -(p * q.log()).sum()
    middle = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    return lm, {
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2,
    }[divergence]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "symmetric", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows_at_once", [1, 5, 13, 100])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_losses_in_parts_have_the_values_and_gradients_of_the_textbook_over_all_logits(
    divergence: Divergence, temperature: float, rows_at_once: int, frozen: bool
) -> None:
    stored = stored_rows(top_k=VOCAB)
    answers = torch.arange(ROWS) * 3
    expected_model, model = Tied(frozen=frozen), Tied(frozen=frozen)
    hidden = model.embedding(answers).tanh().detach().requires_grad_() if frozen else model.embedding(answers).tanh()
    teacher = teacher_rows(stored, VOCAB, temperature)
    lm_R, kd_R = answer_losses(
        model, hidden, answers, teacher, divergence, vocab_size=VOCAB, logits_at_once=rows_at_once * VOCAB
    )
    assert kd_R is not None
    expected_lm, expected_kd = by_the_book(expected_model, answers, stored, temperature, divergence)
    # What is stored is float32.
    assert float(lm_R.detach().sum()) == pytest.approx(float(expected_lm.detach()), rel=1e-12)
    assert float(kd_R.detach().sum()) == pytest.approx(float(expected_kd.detach()), rel=1e-6)
    (lm_R.sum() + 0.7 * kd_R.sum()).backward()
    if frozen:
        assert model.embedding.weight.grad is None
        assert hidden.grad is not None
        return
    (expected_lm + 0.7 * expected_kd).backward()
    assert model.embedding.weight.grad is not None
    torch.testing.assert_close(model.embedding.weight.grad, expected_model.embedding.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 4, 13])
def test_the_number_of_parts_changes_nothing_beyond_rounding(rows_at_once: int) -> None:
    teacher, answers = teacher_rows(stored_rows(top_k=5, num_tail_samples=3), VOCAB, 1.0), torch.arange(ROWS) * 3
    found = []
    for rows in (ROWS, rows_at_once):
        model = Tied(frozen=False)
        hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        hidden.requires_grad_()
        lm_R, kd_R = answer_losses(model, hidden, answers, teacher, vocab_size=VOCAB, logits_at_once=rows * VOCAB)
        assert kd_R is not None
        (lm_R.sum() + kd_R.sum()).backward()
        found.append([lm_R.detach(), kd_R.detach(), hidden.grad, model.embedding.weight.grad])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_without_a_teacher_there_is_the_language_modelling_loss_alone() -> None:
    model, answers = Tied(frozen=False), torch.arange(ROWS)
    hidden = model.embedding(answers).tanh()
    lm_R, kd_R = answer_losses(model, hidden, answers, None, vocab_size=VOCAB, logits_at_once=2 * VOCAB)
    assert kd_R is None
    torch.testing.assert_close(lm_R, nn.functional.cross_entropy(model(hidden), answers, reduction="none"))


def test_a_batch_without_answer_rows_has_no_losses_and_a_gradient_of_zero() -> None:
    model = Tied(frozen=False)
    nothing = torch.zeros(0, dtype=torch.long)
    teacher = teacher_rows(stored_rows(0), VOCAB, 1.0)
    lm_R, kd_R = answer_losses(model, model.embedding(nothing), nothing, teacher, vocab_size=VOCAB)
    assert kd_R is not None
    assert len(lm_R) == len(kd_R) == 0
    (lm_R.sum() + kd_R.sum()).backward()
    assert model.embedding.weight.grad is not None
    assert not bool(model.embedding.weight.grad.any())


class LargestTensors(TorchDispatchMode):
    """The most elements that a new tensor had, in the pass forward and in the one back."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_no_more_logits_than_asked_for_exist_in_either_direction(divergence: Divergence) -> None:
    rows, vocab, at_once = 300, 500, 40
    head = nn.Linear(4, vocab, bias=False)
    hidden = torch.randn(rows, 4).requires_grad_()
    teacher = teacher_rows(stored_rows(rows, vocab, top_k=5), vocab, 1.0)
    with LargestTensors() as forward:
        lm_R, kd_R = answer_losses(
            head,
            hidden,
            torch.zeros(rows, dtype=torch.long),
            teacher,
            divergence,
            vocab_size=vocab,
            logits_at_once=at_once * vocab,
        )
        assert kd_R is not None
        loss = lm_R.sum() + kd_R.sum()
    with LargestTensors() as backward:
        loss.backward()
    # The mask of named ids has one column more.
    assert at_once * vocab <= forward.largest <= at_once * (vocab + 1)
    assert at_once * vocab <= backward.largest <= at_once * (vocab + 1)


def test_the_dense_definition_is_what_the_parts_sum_to() -> None:
    stored, answers, model = stored_rows(top_k=VOCAB), torch.arange(ROWS), Tied(frozen=True)
    hidden = model.embedding(answers).tanh()
    _, kd_R = answer_losses(
        model, hidden, answers, teacher_rows(stored, VOCAB, 1.0), vocab_size=VOCAB, logits_at_once=3 * VOCAB
    )
    assert kd_R is not None
    dense = logit_distillation_loss(model(hidden), exact(stored))
    assert float(kd_R.mean()) == pytest.approx(float(dense), rel=1e-6)
