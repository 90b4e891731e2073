import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.demo.assets import TEACHER
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.suite import Answer, Likelihood, Question
from storage.errors import UserError
from tests.checkpoints import load_tiny_llava

CAPTIONS = ("A red square.", "A red circle is left of a green triangle in the image.", "Square")
QUESTION = "Is it red? Answer by yes or no."


def reference_log_probs(model: Any, processor: Any, text: str, picture: SuitePicture) -> tuple[Tensor, Tensor]:
    """Token ids `[T]` and log-probabilities `[T, V]` in float64 of one text, nothing batched, padded or shared."""
    inputs = processor(text=[text], images=[picture.load(10**6, "ignore")], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.inference_mode():
        logits_TV = model.double()(**inputs).logits[0]
    model.float()
    return inputs["input_ids"][0], logits_TV.log_softmax(-1)


def reference_likelihood(model: Any, processor: Any, picture: SuitePicture, prompt: str, answer: str) -> Likelihood:
    text = f"USER: <image>\n{prompt} ASSISTANT: {answer}<|endoftext|>"
    token_ids, log_probs_TV = reference_log_probs(model, processor, text, picture)
    num_answer = len(processor.tokenizer(f" {answer}").input_ids)
    last = len(token_ids) - 1
    each = [float(log_probs_TV[t - 1, token_ids[t]]) for t in range(last - num_answer, last + 1)]
    return Likelihood(sum(each[:-1]), num_answer, each[-1])


def reference_text(model: Any, processor: Any, picture: SuitePicture, question: Question) -> str:
    """By transformers' own generation, one question alone."""
    text = f"USER: <image>\n{question.prompt} ASSISTANT:"
    inputs = processor(text=[text], images=[picture.load(10**6, "ignore")], return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=question.max_new_tokens,
            suppress_tokens=[model.config.image_token_id],
            eos_token_id=processor.tokenizer.eos_token_id,
        )
    decoded: str = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return decoded.strip()


def questions_about(pictures: list[SuitePicture]) -> list[Question]:
    made = []
    for number, picture in enumerate(pictures):
        made += [
            Question("Describe the image.", (picture,), CAPTIONS[: 1 + number % 3]),
            Question(QUESTION, (picture,), ("Yes", "No"), first_token_only=True),
            Question(QUESTION, (picture,), max_new_tokens=1 + 3 * number),
            Question("What is it?", (picture,), max_new_tokens=6),
        ]
    return made


def reference(model: Any, processor: Any, question: Question) -> Answer:
    (picture,) = question.pictures
    if not question.candidates:
        return reference_text(model, processor, picture, question)
    found = tuple(reference_likelihood(model, processor, picture, question.prompt, one) for one in question.candidates)
    if not question.first_token_only:
        return found
    # Every answer begins with a token for the blank before it.
    text = f"USER: <image>\n{question.prompt} ASSISTANT: "
    _, log_probs_TV = reference_log_probs(model, processor, text, picture)
    first = [processor.tokenizer(f" {one}").input_ids[1] for one in question.candidates]
    return tuple(Likelihood(float(log_probs_TV[-1, token]), 1, 0.0) for token in first)


def assert_equal(found: Answer, expected: Answer) -> None:
    if isinstance(expected, str):
        assert found == expected
        return
    assert not isinstance(found, str)
    for one, wanted in zip(found, expected, strict=True):
        assert one.num_tokens == wanted.num_tokens
        assert one.log_prob == pytest.approx(wanted.log_prob, rel=2e-5, abs=2e-4)
        assert one.end_log_prob == pytest.approx(wanted.end_log_prob, rel=2e-5, abs=2e-4)


@pytest.mark.parametrize("shares_prefixes", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_those_of_one_question_at_a_time_in_float64(
    batch_size: int, shares_prefixes: bool, model: Any, processor: Any, pictures: list[SuitePicture]
) -> None:
    questions = questions_about(pictures)
    expected = [reference(model, processor, question) for question in questions]
    answerer = Answerer(model, processor, EvaluationConfig(batch_size=batch_size))
    assert answerer.shares_prefixes
    assert not answerer.notes
    answerer.shares_prefixes = shares_prefixes
    for found, wanted in zip(answerer.answers(questions), expected, strict=True):
        assert_equal(found, wanted)


def test_the_end_of_answers_is_told_by_words_that_the_tokenizer_has(pictures: list[SuitePicture]) -> None:
    model, processor = load_tiny_llava(TEACHER)
    answerer = Answerer(model.float(), processor, EvaluationConfig())
    answers = ("a blue circle", "red", "neverheard circle")
    (found,) = answerer.answers([Question("Describe the image.", (pictures[0],), answers)])
    assert not isinstance(found, str)
    assert [one.num_tokens for one in found] == [3, 1, 2]
    text = f"USER: <image>\nDescribe the image. ASSISTANT: {answers[0]}"
    token_ids, log_probs_TV = reference_log_probs(model, processor, text, pictures[0])
    each = [float(log_probs_TV[t - 1, token_ids[t]]) for t in (-3, -2, -1)]
    assert found[0].mean == pytest.approx(sum(each) / 3, rel=2e-5, abs=2e-4)
    assert found[0].end_log_prob == pytest.approx(float(log_probs_TV[-1, processor.tokenizer.eos_token_id]), abs=2e-4)


@pytest.mark.parametrize(("words", "named"), [(("Yes",), "'Yes'"), (("Yes", "No"), "'Yes' and 'No'")])
def test_the_probability_of_a_word_that_the_tokenizer_does_not_have_is_refused(
    words: tuple[str, ...], named: str, pictures: list[SuitePicture]
) -> None:
    answerer = Answerer(*load_tiny_llava(TEACHER), EvaluationConfig())
    with pytest.raises(UserError, match=rf"the tokenizer does not have {named}: .*; ask by another --protocol"):
        answerer.answers([Question(QUESTION, (pictures[0],), words, first_token_only=True)])
    (answer,) = answerer.answers([Question(QUESTION, (pictures[0],), words)])
    assert [one.num_tokens for one in answer if not isinstance(one, str)] == [1] * len(words)


def test_questions_about_one_picture_compute_it_once(model: Any, processor: Any, pictures: list[SuitePicture]) -> None:
    answerer = Answerer(model, processor, EvaluationConfig())
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    answerer.answers([Question(f"Is it {word}?", (pictures[0],), ("yes", "no")) for word in ("red", "blue", "big")])
    assert seen == [1]


def test_several_pictures_and_none_are_asked_about_too(
    model: Any, processor: Any, pictures: list[SuitePicture]
) -> None:
    questions = [
        Question("Hello, what is a square?", (), CAPTIONS),
        Question("Compare.", (pictures[1], pictures[0]), CAPTIONS),
        Question("Compare.", (pictures[0], pictures[1]), CAPTIONS),
        Question("Describe the image.", (pictures[0],), CAPTIONS),
    ]
    answerer = Answerer(model, processor, EvaluationConfig(batch_size=16))
    together = answerer.answers(questions)
    for question, found in zip(questions, together, strict=True):
        (alone,) = answerer.answers([question])
        assert_equal(found, alone)
    assert together[1] != together[2]


def test_a_blank_picture_has_the_size_of_its_own_and_nothing_of_it(
    model: Any, processor: Any, pictures: list[SuitePicture]
) -> None:
    questions = [Question("Describe the image.", (picture,), CAPTIONS[:1]) for picture in pictures[:2]]
    first, second = Answerer(model, processor, EvaluationConfig(), blank=True).answers(questions)
    assert first == second
    assert first not in Answerer(model, processor, EvaluationConfig()).answers(questions)
    shown = SuitePicture(pictures[0].source, crop=(1, 2, 9, 7)).load(10**6, "ignore", blank=True)
    assert shown.size == (8, 5)
    assert shown.getcolors() == [(40, (127, 127, 127))]


def test_bfloat16_models_answer_too(model: Any, processor: Any, pictures: list[SuitePicture]) -> None:
    question = Question("Describe the image.", (pictures[0],), CAPTIONS)
    (exact,) = Answerer(model, processor, EvaluationConfig()).answers([question])
    (rough,) = Answerer(model.bfloat16(), processor, EvaluationConfig()).answers([question])
    assert not isinstance(exact, str)
    assert not isinstance(rough, str)
    for one, wanted in zip(rough, exact, strict=True):
        assert one.total == pytest.approx(wanted.total, rel=0.05, abs=1.0)


def test_an_image_that_cannot_be_read_is_named_with_its_question(model: Any, processor: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    answerer = Answerer(model, processor, EvaluationConfig())
    question = Question(QUESTION, (SuitePicture(PictureFile(file)),))
    with pytest.raises(UserError, match=r"question 'Is it red\?.*' about .*x\.png: broken_image"):
        answerer.answers([question])
    file.unlink()
    with pytest.raises(UserError, match=r"about .*x\.png: .*No such file"):
        answerer.answers([question])


def test_a_long_question_is_refused_and_not_cut(model: Any, processor: Any, pictures: list[SuitePicture]) -> None:
    answerer = Answerer(model, processor, EvaluationConfig(max_length=12))
    with pytest.raises(UserError, match=r"tokens, max_length is 12; raise evaluate\.max_length"):
        answerer.answers([Question(QUESTION, (pictures[0],))])


@pytest.mark.parametrize("candidates", [(), CAPTIONS])
def test_a_damaged_model_is_named_as_such(
    candidates: tuple[str, ...], model: Any, processor: Any, pictures: list[SuitePicture]
) -> None:
    answerer = Answerer(model, processor, EvaluationConfig())
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite; is it damaged"):
        answerer.answers([Question(QUESTION, (pictures[0],), candidates)])


def test_a_template_with_the_picture_behind_the_question_shares_nothing_and_answers_alike(
    model: Any, processor: Any, pictures: list[SuitePicture]
) -> None:
    question = Question("Is it red? <image>", (pictures[0],), CAPTIONS)
    other = Question("Is it <image>?", (pictures[0],), CAPTIONS)
    answerer = Answerer(model, processor, EvaluationConfig())
    together = answerer.answers([question, other])
    for one, found in zip((question, other), together, strict=True):
        (alone,) = answerer.answers([one])
        assert_equal(found, alone)


def test_pictures_are_cropped_and_marked_before_they_are_shown(tmp_path: Path) -> None:
    from stages.evaluation.suites.pictures import Mark

    Image.new("RGB", (40, 20), "white").save(tmp_path / "x.png")
    marks = (Mark((0.25, 0.0, 0.75, 1.0), "red"),)
    shown = SuitePicture(PictureFile(tmp_path / "x.png"), marks=marks).load(10**6, "ignore")
    assert shown.getpixel((10, 10)) == (255, 0, 0)
    assert shown.getpixel((20, 10)) == (255, 255, 255)


@pytest.mark.parametrize("crop", [(50, 0, 60, 10), (0, 0, 0, 5), (-9, -9, 0, 0), (0, 0, 10**5, 10**5)])
def test_a_box_that_shows_nothing_or_too_much_is_refused(crop: tuple[int, int, int, int], tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "white").save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"the box \(.*\) (shows nothing|has more than)"):
        SuitePicture(PictureFile(tmp_path / "x.png"), crop=crop).load(10**6, "ignore")
