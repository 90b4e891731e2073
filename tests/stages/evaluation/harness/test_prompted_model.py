import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoModelForImageTextToText

from stages.checkpoints.image_settings import note_image_settings
from stages.checkpoints.processors import load_processor
from stages.evaluation.harness.prompted_model import DecodingConfig, PromptedModel
from stages.evaluation.harness.prompts import Prompt
from stages.families.registry import FAMILIES
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from storage.errors import UserError
from storage.samples.image_settings import ImageConfig
from tests.checkpoints import draw_random_image
from tests.tiny_families import RECIPES, make_tiny_family

PICTURES = [draw_random_image(random.Random(seed)) for seed in range(4)]
QUESTIONS = ["What is it?", "Describe the image in many words, and say the color of the square.", "Why?", "Where is A?"]
PROMPTS = [
    Prompt(f"prompt {number}", ({"from": "user", "value": f"<image>\n{question}"},), (picture,))
    for number, (question, picture) in enumerate(zip(QUESTIONS, PICTURES, strict=True))
]
TALK = Prompt(
    "talk",
    (
        {"from": "user", "value": "<image>\nWhat is it?"},
        {"from": "assistant", "value": "A square."},
        {"from": "user", "value": "<image>\nAnd this?"},
    ),
    tuple(PICTURES[:2]),
)
TEXT_ONLY = Prompt("text", ({"from": "system", "value": "Be short."}, {"from": "user", "value": "What is a square?"}))
ALL = [*PROMPTS[:2], TALK, TEXT_ONLY, *PROMPTS[2:]]
TEXTS = [
    "USER: <image>\nWhat is it? ASSISTANT:",
    f"USER: <image>\n{QUESTIONS[1]} ASSISTANT:",
    "USER: <image>\nWhat is it? ASSISTANT: A square.<|endoftext|>USER: <image>\nAnd this? ASSISTANT:",
    "Be short. USER: What is a square? ASSISTANT:",
    "USER: <image>\nWhy? ASSISTANT:",
    "USER: <image>\nWhere is A? ASSISTANT:",
]
"""What the template of the tiny checkpoint makes of `ALL`."""

SHORT = DecodingConfig(max_new_tokens=8)
ANSWERS = ["A red square.", "Yes", "A blue circle is left of a green triangle."]


def likeliest(model: Any, processor: Any, text: str, images: Sequence[object], num_tokens: int) -> str:
    """The answer by the library's processor and one forward pass a token; the image token is never chosen."""
    inputs = processor(text=[text], return_tensors="pt", **({"images": [list(images)]} if images else {}))
    ids, pixels = inputs["input_ids"], {name: inputs[name] for name in ("pixel_values",) if name in inputs}
    answer: list[int] = []
    while len(answer) < num_tokens and answer[-1:] != [processor.tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = model(input_ids=ids, **pixels).logits[0, -1]
        logits[model.config.image_token_id] = -torch.inf
        answer.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_the_most_likely_tokens_one_prompt_at_a_time_and_in_batches(
    batch_size: int, model: Any, processor: Any
) -> None:
    expected = [likeliest(model, processor, text, prompt.images, 8) for text, prompt in zip(TEXTS, ALL, strict=True)]
    assert len(set(expected)) > 3
    assert list(PromptedModel(model, processor, batch_size).generate(ALL, SHORT)) == expected


def test_an_answer_ends_with_its_end_token_in_a_batch_whose_others_go_on(model: Any, processor: Any) -> None:
    prompted, longer = PromptedModel(model, processor, 4), DecodingConfig(max_new_tokens=24)
    long = list(prompted.generate(PROMPTS, longer))
    # A token of the first answer that the others lack becomes an end token.
    ids = processor.tokenizer.encode(long[0], add_special_tokens=False)
    end = next(one for one in ids[2:] if all(processor.tokenizer.decode([one]) not in text for text in long[1:]))
    model.generation_config.eos_token_id = end
    short = list(PromptedModel(model, processor, 4).generate(PROMPTS, longer))
    assert short[0] == long[0].partition(processor.tokenizer.decode([end]))[0].strip() != ""
    assert short[1:] == long[1:]


def test_a_stop_text_ends_an_answer_before_it(model: Any, processor: Any) -> None:
    prompted = PromptedModel(model, processor, 4)
    whole = list(prompted.generate(PROMPTS, DecodingConfig(max_new_tokens=16)))
    word = whole[0][3:5]
    stopped = list(prompted.generate(PROMPTS, DecodingConfig(max_new_tokens=16, stop=("never said", word))))
    assert stopped == [text.partition(word)[0].strip() for text in whole]
    assert stopped[0] != whole[0]


def test_a_temperature_draws_answers_by_the_seed_of_the_process(model: Any, processor: Any) -> None:
    prompted = PromptedModel(model, processor, 2)
    drawn = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn.append(list(prompted.generate(PROMPTS, DecodingConfig(max_new_tokens=8, temperature=2.0))))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_sampling_settings_of_a_checkpoint_do_not_make_an_answer_random(model: Any, processor: Any) -> None:
    expected = list(PromptedModel(model, processor, 2).generate(PROMPTS, SHORT))
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)
    assert list(PromptedModel(model, processor, 2).generate(PROMPTS, SHORT)) == expected


def test_an_answer_ends_where_the_models_length_does(model: Any, processor: Any) -> None:
    long = DecodingConfig(max_new_tokens=24)
    expected = list(PromptedModel(model, processor, 1).generate(PROMPTS[:2], long))
    lengths = [len(processor(text=[t], images=[[PICTURES[0]]])["input_ids"][0]) for t in TEXTS[:2]]
    model.config.text_config.max_position_embeddings = max(lengths) + 3
    answers = list(PromptedModel(model, processor, 2).generate(PROMPTS[:2], long))
    assert answers[0] == expected[0]
    assert answers[1] != expected[1]
    assert expected[1].startswith(answers[1])


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(model: Any, processor: Any) -> None:
    model.config.text_config.max_position_embeddings = 40
    with pytest.raises(UserError, match=r"prompt 1: prompt_beyond_max_length: \d+ tokens, and the model reads 40"):
        list(PromptedModel(model, processor, 2).generate(PROMPTS, SHORT))


def test_a_prompt_whose_picture_cannot_be_read_is_named(model: Any, processor: Any) -> None:
    for broken, reason in ((b"\x89PNG\r\n\x1a\n", "broken_image"), ("nowhere.png", "missing_image")):
        prompt = dataclasses.replace(PROMPTS[1], images=(broken,))
        with pytest.raises(UserError, match=f"prompt 1: {reason}"):
            list(PromptedModel(model, processor, 2).generate([PROMPTS[0], prompt], SHORT))


def test_pictures_are_turned_and_placed_as_the_model_was_trained(model: Any, processor: Any, tmp_path: Path) -> None:
    picture, exif = Image.effect_noise((60, 24), 80).convert("RGB"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    asked = Prompt("late", ({"from": "user", "value": "What is <image>?"},), (tmp_path / "turned.png",))

    def answer() -> str:
        return next(PromptedModel(model, processor).generate([asked], SHORT))

    turned = picture.transpose(Image.Transpose.ROTATE_270)
    expected = likeliest(model, processor, "USER: <image>\nWhat is ? ASSISTANT:", [picture], 8)
    assert answer() == expected
    note_image_settings(model.config, ImageConfig(exif="apply", position="as_written"))
    assert answer() == likeliest(model, processor, "USER: What is <image>\n? ASSISTANT:", [turned], 8)


@pytest.mark.parametrize("model_type", RECIPES)
def test_answers_in_batches_are_those_one_by_one_in_every_family(model_type: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_family(tmp_path, model_type)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = load_processor(checkpoint)
    wide = Image.effect_noise((90, 30), 60).convert("RGB")
    prompts = [*PROMPTS[:3], dataclasses.replace(PROMPTS[3], images=(wide,)), TEXT_ONLY]
    alone = list(PromptedModel(model, processor, 1).generate(prompts, SHORT))
    assert len(set(alone)) > 2
    assert list(PromptedModel(model, processor, 5).generate(prompts, SHORT)) == alone
    asked = [(prompt, ANSWERS) for prompt in prompts]
    single, batched = (list(PromptedModel(model, processor, size).scores(asked)) for size in (1, 3))
    np.testing.assert_allclose(single, batched, rtol=1e-4)


def test_a_family_that_is_not_known_is_not_joined_where_its_pictures_differ_in_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_tiny_family(tmp_path, "llava_next")
    monkeypatch.delitem(FAMILIES, "llava_next")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    wide = Image.effect_noise((90, 30), 60).convert("RGB")
    prompts = [PROMPTS[0], dataclasses.replace(PROMPTS[1], images=(wide,)), PROMPTS[2]]
    one_by_one, together = (PromptedModel(model, load_processor(checkpoint), size) for size in (1, 3))
    assert list(together.generate(prompts, SHORT)) == list(one_by_one.generate(prompts, SHORT))


def make_student(model: Any) -> Any:
    """A student of half the width, with a post-connector."""
    text = {**model.config.text_config.to_dict(), "hidden_size": 24}
    config = CompoDistillStudentConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=text,
        adapter_hidden_size=32,
        image_token_index=model.config.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CompoDistillStudentForConditionalGeneration(config).eval()


def test_a_student_that_was_not_exported_answers_in_batches(model: Any, processor: Any) -> None:
    student = make_student(model)
    student.config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    alone = list(PromptedModel(student, processor, 1).generate(PROMPTS, SHORT))
    assert len(set(alone)) > 1
    assert list(PromptedModel(student, processor, 4).generate(PROMPTS, SHORT)) == alone


def by_hand(model: Any, processor: Any, text: str, images: Sequence[object], answer: str) -> tuple[float, bool]:
    """The sum over the answer's tokens in float64, of logits that the library computes for the whole text."""
    processed = [
        processor(text=[each], return_tensors="pt", **({"images": [list(images)]} if images else {}))
        for each in (text, f"{text} {answer}<|endoftext|>")
    ]
    start, ids = processed[0]["input_ids"].shape[1], processed[1]["input_ids"]
    assert torch.equal(processed[0]["input_ids"][0], ids[0, :start])
    pixels = {name: processed[1][name] for name in ("pixel_values",) if name in processed[1]}
    with torch.no_grad():
        logits_TV = model(input_ids=ids, **pixels).logits[0].double()
    total, is_greedy = 0.0, True
    for position in range(start, ids.shape[1]):
        row, token = logits_TV[position - 1], int(ids[0, position])
        total += float(row[token]) - float(row.exp().sum().log())
        is_greedy &= int(row.argmax()) == token
    return total, is_greedy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_probabilities_of_answers_are_sums_over_their_tokens(batch_size: int, model: Any, processor: Any) -> None:
    asked = [(prompt, text) for prompt, text in zip(ALL, TEXTS, strict=True) if prompt is not TALK]
    scores = PromptedModel(model, processor, batch_size).scores((prompt, ANSWERS) for prompt, _ in asked)
    for (prompt, text), found in zip(asked, scores, strict=True):
        for (log_prob, is_greedy), answer in zip(found, ANSWERS, strict=True):
            expected = by_hand(model, processor, text, prompt.images, answer)
            assert log_prob == pytest.approx(expected[0], rel=1e-5)
            assert is_greedy == expected[1]


def test_an_answer_is_greedy_if_no_token_is_likelier_than_one_of_its_own(model: Any, processor: Any) -> None:
    encode = processor.tokenizer.encode
    likely = [*encode(" A red square.", add_special_tokens=False), processor.tokenizer.eos_token_id]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[likely] = 1.0
    ((good, other),) = PromptedModel(model, processor).scores([(PROMPTS[0], ["A red square.", "A blue square."])])
    assert (good.is_greedy, other.is_greedy) == (True, False)
    model.lm_head.bias.data[processor.tokenizer.eos_token_id] = 0.9
    ((good,),) = PromptedModel(model, processor).scores([(PROMPTS[0], ["A red square."])])
    assert not good.is_greedy


def test_an_answer_that_does_not_fit_is_named(model: Any, processor: Any) -> None:
    model.config.text_config.max_position_embeddings = 60
    with pytest.raises(UserError, match=r"prompt 0: prompt_beyond_max_length: \d+ tokens"):
        list(PromptedModel(model, processor).scores([(PROMPTS[0], ["square " * 60])]))
