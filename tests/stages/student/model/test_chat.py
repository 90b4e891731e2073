import random
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from stages.student.model.chat import Chat
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.checkpoints import draw_random_image, load_tiny_llava, make_tiny_llava

IMAGE = draw_random_image(random.Random(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("chat") / "model")


def open_chat(checkpoint: Path, max_new_tokens: int = 6) -> Chat:
    model, processor = load_tiny_llava(checkpoint)
    return Chat(model, processor, IMAGE, max_new_tokens)


def greedy(checkpoint: Path, text: str, num_tokens: int) -> str:
    """The answer by the library's processor and one forward pass a token; the image token is never chosen."""
    model, processor = load_tiny_llava(checkpoint)
    inputs = processor(images=[IMAGE], text=[text], return_tensors="pt")
    ids = inputs["input_ids"]
    answer: list[int] = []
    while len(answer) < num_tokens and answer[-1:] != [processor.tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[model.config.image_token_id] = -torch.inf
        answer.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def test_answers_are_the_most_likely_tokens_and_stay_in_the_conversation(checkpoint: Path) -> None:
    chat = open_chat(checkpoint)
    first = chat.ask("What is it?", lambda _: None)
    assert first == greedy(checkpoint, "USER: <image>\nWhat is it? ASSISTANT:", 6)
    second = chat.ask("And its color?", lambda _: None)
    eos = "<|endoftext|>"
    earlier = f"USER: <image>\nWhat is it? ASSISTANT: {first}{eos}"
    assert second == greedy(checkpoint, f"{earlier}USER: And its color? ASSISTANT:", 6)
    assert second != open_chat(checkpoint).ask("And its color?", lambda _: None)


def test_an_answer_is_written_in_pieces_while_it_is_made(checkpoint: Path) -> None:
    pieces: list[str] = []
    answer = open_chat(checkpoint, max_new_tokens=24).ask("What is it?", pieces.append)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == answer


def test_sampling_settings_of_a_checkpoint_do_not_make_an_answer_random(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_tiny_llava(checkpoint)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    answers = {Chat(loaded, processor, IMAGE, 6).ask("What is it?", lambda _: None) for _ in range(3)}
    assert answers == {open_chat(checkpoint).ask("What is it?", lambda _: None)}


def test_a_question_that_names_another_image_or_is_too_long_is_refused_and_leaves_the_conversation(
    checkpoint: Path,
) -> None:
    chat, alone = open_chat(checkpoint), open_chat(checkpoint)
    for bad in ("<image> and <image>?", "word " * 3000):
        with pytest.raises(UnusableSample):
            chat.ask(bad, lambda _: None)
    assert chat.ask("What is it?", lambda _: None) == alone.ask("What is it?", lambda _: None)


def test_a_length_that_leaves_no_room_names_the_flag_and_the_models_length(checkpoint: Path) -> None:
    prompt = 16 + len(load_tiny_llava(checkpoint)[1].tokenizer("USER: \n? ASSISTANT:")["input_ids"])
    with pytest.raises(
        UserError, match=rf"are {prompt} tokens, and --max-new-tokens is 5000; the model reads 2048 in all"
    ):
        open_chat(checkpoint, max_new_tokens=5000)
    most = 2048 - prompt
    with pytest.raises(UserError, match=f"--max-new-tokens is {most + 1}"):
        open_chat(checkpoint, max_new_tokens=most + 1)
    chat = open_chat(checkpoint, max_new_tokens=most)
    with pytest.raises(UnusableSample, match=f"--max-new-tokens is {most}; the model reads 2048"):
        chat.ask("What is it, and what is beside it?", lambda _: None)


def test_a_model_without_a_chat_template_is_refused(checkpoint: Path) -> None:
    model, processor = load_tiny_llava(checkpoint)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no \(default\) chat template"):
        Chat(model, processor, IMAGE, 6)
