import math
from typing import Any

import pytest
import torch
from PIL import Image
from stages.evaluation.caption_pairs import CaptionPair
from stages.evaluation.scoring import (
    count_pairs,
    letter_scores,
    letter_tokens,
    likelihood_scores,
    share_of_first_letter,
)
from torch import Tensor

from stages.conversations.encoder import ConversationEncoder
from stages.evaluation.config import EvaluationConfig
from storage.errors import UserError
from tests.checkpoints import CHAT_TEMPLATE_WITHOUT_GENERATION
from tests.stages.evaluation.advances import Advances


@pytest.fixture(autouse=True)
def _in_inference_mode() -> Any:
    with torch.inference_mode():
        yield


def reference_log_probs(model: Any, processor: Any, text: str, pair: CaptionPair) -> tuple[Tensor, Tensor]:
    """Token ids `[T]` and log-probabilities `[T, V]` in float64 of one text, nothing batched or padded."""
    image = Image.open(pair.image).convert("RGB")
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    logits_TV = model.double()(**inputs).logits[0]
    model.float()
    return inputs["input_ids"][0], logits_TV.log_softmax(-1)


def reference_likelihood(model: Any, processor: Any, pair: CaptionPair, caption: str) -> float:
    text = f"USER: <image>\nDescribe the image. ASSISTANT: {caption}<|endoftext|>"
    token_ids, log_probs_TV = reference_log_probs(model, processor, text, pair)
    num_answer = len(processor.tokenizer(f" {caption}<|endoftext|>").input_ids)
    first = len(token_ids) - num_answer
    return sum(float(log_probs_TV[t - 1, token_ids[t]]) for t in range(first, len(token_ids)))


def reference_letters(model: Any, processor: Any, pair: CaptionPair, a: str, b: str) -> tuple[float, float]:
    question = f"Which caption fits the image?\nA: {a}\nB: {b}\nAnswer with A or B."
    _, log_probs_TV = reference_log_probs(model, processor, f"USER: <image>\n{question} ASSISTANT:", pair)
    ids = [processor.tokenizer(letter).input_ids for letter in (" A", " B")]
    assert [len(one) for one in ids] == [1, 1]
    return float(log_probs_TV[-1, ids[0][0]]), float(log_probs_TV[-1, ids[1][0]])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_likelihoods_equal_the_unbatched_float64_reference(
    batch_size: int, model: Any, processor: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    expected = [
        [reference_likelihood(model, processor, pair, text) for text in (pair.caption, pair.negative_caption)]
        for pair in pairs
    ]
    task = Advances()
    found = likelihood_scores(model, encoder, pairs, EvaluationConfig(batch_size=batch_size), task)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=2e-4)
    assert sum(task.amounts) == len(pairs)
    assert max(task.amounts) == min(batch_size, len(pairs))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_letters_equal_the_unbatched_float64_reference_in_both_orders(
    batch_size: int, model: Any, processor: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    expected = []
    for pair in pairs:
        fitting_a, negative_b = reference_letters(model, processor, pair, pair.caption, pair.negative_caption)
        negative_a, fitting_b = reference_letters(model, processor, pair, pair.negative_caption, pair.caption)
        expected.append([[fitting_a, negative_b], [fitting_b, negative_a]])
    config = EvaluationConfig(scoring="letters", batch_size=batch_size)
    found = letter_scores(model, encoder, pairs, config)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=2e-4)


def test_bfloat16_models_are_scored_too(model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]) -> None:
    exact = likelihood_scores(model, encoder, pairs, EvaluationConfig())
    rough = likelihood_scores(model.bfloat16(), encoder, pairs, EvaluationConfig())
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=1.0)


def test_a_pair_counts_one_a_half_or_nothing() -> None:
    assert count_pairs(torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0]])).tolist() == [1.0, 0.0, 0.5]


def test_a_model_that_always_answers_a_is_a_guess() -> None:
    # Order 1 has the fitting caption as A, order 2 as B; the letter A always scores -1.
    scores = torch.tensor([[[-1.0, -3.0], [-3.0, -1.0]]] * 4)
    assert count_pairs(scores).tolist() == [0.5] * 4
    assert share_of_first_letter(scores) == 1.0


def test_a_model_that_is_always_right_has_no_preference_for_a_letter() -> None:
    scores = torch.tensor([[[-1.0, -3.0], [-1.0, -3.0]]] * 4)
    assert count_pairs(scores).tolist() == [1.0] * 4
    assert share_of_first_letter(scores) == 0.5


def test_the_letters_tokens_follow_the_generation_prompt(encoder: ConversationEncoder) -> None:
    tokens = letter_tokens(encoder)
    tokenizer = encoder.processor.tokenizer
    assert [tokenizer.decode(token) for token in tokens.letters] == [" A", " B"]
    assert tokens.lead.tolist() == []


def test_what_both_answers_begin_with_is_put_before_the_letters(processor: Any) -> None:
    processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION.replace("{{- ' ' +", "{{- ' \\n' +")
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    tokens = letter_tokens(encoder)
    assert processor.tokenizer.decode(tokens.lead) == " \n"
    assert [processor.tokenizer.decode(token) for token in tokens.letters] == ["A", "B"]


def test_a_generation_prompt_that_is_not_before_answers_cannot_score_letters(processor: Any) -> None:
    processor.chat_template = str(processor.chat_template).replace(
        "add_generation_prompt -%}{{- 'ASSISTANT:'", "add_generation_prompt -%}{{- 'ASSISTANT: (thinks)'"
    )
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    with pytest.raises(UserError, match="letters cannot be scored"):
        letter_tokens(encoder)


@pytest.mark.parametrize("score", [likelihood_scores, letter_scores])
def test_an_image_that_cannot_be_read_is_named_with_its_pair(
    score: Any, model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    pairs[3].image.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match=r"pair '3' of swap_obj, image .*3\.png: broken_image"):
        score(model, encoder, pairs, EvaluationConfig())
    pairs[3].image.unlink()
    with pytest.raises(UserError, match=r"pair '3' of swap_obj.*No such file"):
        score(model, encoder, pairs, EvaluationConfig())


@pytest.mark.parametrize("score", [likelihood_scores, letter_scores])
def test_a_long_caption_is_refused_and_not_cut(
    score: Any, model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    with pytest.raises(UserError, match=r"pair '0'.*tokens, max_length is 20; raise it"):
        score(model, encoder, pairs, EvaluationConfig(max_length=20))


@pytest.mark.parametrize("score", [likelihood_scores, letter_scores])
def test_scores_that_are_not_finite_are_an_error(
    score: Any, model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite for 5 of 5 pairs, first pair '0'"):
        score(model, encoder, pairs, EvaluationConfig())


@pytest.mark.parametrize("prompt", ["Which?", "{a} only", "{a} {b} {b}", "{a} {b} {c}", "{a} {} {b}"])
def test_a_letter_prompt_must_show_each_caption_once(prompt: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        EvaluationConfig(letter_prompt=prompt)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        EvaluationConfig(scorings="letters")  # type: ignore[call-arg]
