from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from examples.scenes import packing, processor, scoring
from examples.scenes.choice import ask_choice
from examples.scenes.models import build_student_lm, build_teacher
from examples.scenes.patches import GRID
from examples.scenes.train_teacher import answer_logprobs
from pipeline.demo.assets import STUDENT_LM, TEACHER
from pipeline.demo.scenes import language, pairs, world
from pipeline.demo.scenes.draw import draw
from tests.pipeline.demo.caption_reader import reads_as_true, scenes_and_things

VARIANTS: tuple[world.Variant, ...] = ("shapes", "digits")


# -- Words and tokens


def test_every_word_said_of_scenes_is_one_token_and_decodes_to_itself() -> None:
    tokenizer = processor.build_tokenizer()
    rng = world.generator(9)
    for variant in VARIANTS:
        for things in scenes_and_things(variant, num=100):
            for ask in (*language.QUESTIONS.values(), ask_choice):
                exchange = ask(rng, things, variant) or language.ask_without_image(rng)
                for text in (exchange.question, exchange.answer):
                    ids = tokenizer(text)["input_ids"]
                    assert ids == list(processor.word_ids(text))
                    assert tokenizer.unk_token_id not in ids
                    assert tokenizer.decode(ids) == text


def test_the_chat_template_marks_answers_with_their_end_and_matches_its_generation_prompt() -> None:
    tokenizer = processor.build_tokenizer()
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is at the top left?"}],
    }
    turns = [
        question,
        {"role": "assistant", "content": "a red seven"},
        {"role": "user", "content": "Describe the image."},
        {"role": "assistant", "content": [{"type": "text", "text": "a red seven above a blue three"}]},
    ]
    out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answers = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answers) == "a red seven<eos> a red seven above a blue three<eos>"
    opened = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert opened == "USER: <image>\nWhat is at the top left? ASSISTANT:"
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(opened)


def test_packed_questions_are_answered_as_if_each_stood_alone() -> None:
    model = build_teacher(seed=0).eval()
    chat = processor.build_processor()
    pair = pairs.sample_pairs(1, seed=0, variant="shapes")["swap_obj"][0]
    pixels = torch.from_numpy(pair.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    row = packing.Row(length=200)
    for caption in (pair.negative, pair.caption):
        row.add(language.Exchange("Is there a red circle?", "yes"))
        row.add(language.Exchange(language.DESCRIBE, caption))
    batch = packing.pack([row])
    with torch.inference_mode():
        logprob_R, _ = answer_logprobs(model, pixels, batch)
    packed = torch.zeros(batch.num_segments).index_add(0, batch.segment_R, logprob_R)[[1, 3]]
    images = [Image.fromarray(pair.pixels)] * 2
    alone = scoring.caption_scores(model, chat, images, [pair.negative, pair.caption])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-5)


def test_a_question_without_image_does_not_see_the_image() -> None:
    row = packing.Row(length=100)
    row.add(language.Exchange("What is the opposite of left?", "right", about_image=False))
    mask_TT = packing.pack([row]).mask_B1TT[0, 0]
    image = slice(2, len(packing.PREFIX))
    assert not mask_TT[len(packing.PREFIX) :, image].any()
    assert mask_TT[len(packing.PREFIX) :, :2].all()


# -- The bundled models


@pytest.fixture(scope="module")
def teacher() -> tuple[object, object]:
    model = AutoModelForImageTextToText.from_pretrained(TEACHER, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(TEACHER, local_files_only=True)


def test_the_bundled_teacher_is_a_small_stock_llava(teacher: tuple) -> None:
    model, chat = teacher
    assert type(model).__module__.startswith("transformers.")
    assert (TEACHER / "model.safetensors").stat().st_size <= 4_000_000
    assert model.config.text_config.num_hidden_layers >= 8
    text = chat.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    ids = chat(images=Image.new("RGB", (48, 48)), text=text, return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == GRID * GRID
    assert chat.tokenizer.get_vocab() == processor.build_tokenizer().get_vocab()


@pytest.mark.parametrize(("variant", "floor"), [("shapes", 0.8), ("digits", 0.8)])
def test_the_bundled_teacher_tells_captions_from_hard_negatives(
    teacher: tuple, variant: world.Variant, floor: float
) -> None:
    accuracy = scoring.pair_accuracy(*teacher, pairs.sample_pairs(40, seed=77, variant=variant))
    assert min(accuracy.values()) >= floor, accuracy


def test_the_bundled_teacher_describes_what_it_sees(teacher: tuple) -> None:
    model, chat = teacher
    scenes = world.sample_scenes(rng := world.generator(78), 12, "shapes", "heldout")
    images = [Image.fromarray(pixels) for pixels in draw(scenes, rng)]
    content = [{"type": "image"}, {"type": "text", "text": language.DESCRIBE}]
    prompt = chat.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = chat(images=images, text=[prompt] * len(images), return_tensors="pt")
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    said = chat.tokenizer.batch_decode(out, skip_special_tokens=True)
    right = [reads_as_true(text, scenes.things(i), slack=0) for i, text in enumerate(said)]
    assert np.mean(right) >= 0.75, said


def test_the_bundled_student_language_model_shares_the_teachers_vocabulary() -> None:
    model = AutoModelForCausalLM.from_pretrained(STUDENT_LM, local_files_only=True)
    # AutoTokenizer would make a byte-level Qwen2Tokenizer of it, whatever the folder's files say.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(STUDENT_LM, local_files_only=True)
    teacher_config = json.loads((TEACHER / "config.json").read_text())
    assert 2 * model.config.hidden_size == teacher_config["text_config"]["hidden_size"]
    assert tokenizer.get_vocab() == processor.build_tokenizer().get_vocab()
    fresh = build_student_lm(seed=0)
    ids = tokenizer("a red circle left of a blue square<eos>", return_tensors="pt")
    with torch.inference_mode():
        trained, untrained = (m.float()(**ids, labels=ids["input_ids"]).loss for m in (model, fresh))
    assert trained < 0.5 * untrained


@pytest.mark.parametrize("folder", [TEACHER, STUDENT_LM])
def test_the_training_record_names_its_command_and_leads_to_no_place_on_a_machine(folder: Path) -> None:
    record = json.loads((folder / "TRAINING.json").read_text())
    assert record["command"].startswith("python -m examples.scenes.train_")
    assert "/tmp" not in json.dumps(record)
    assert record["num_parameters"] > 0
