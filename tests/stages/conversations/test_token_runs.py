from pathlib import Path
from typing import Any

import pytest
import torch

from stages.conversations.encoder import ConversationEncoder
from stages.conversations.token_runs import token_runs, token_texts
from tests.checkpoints import load_tiny_llava, make_tiny_llava
from tests.stages.conversations.test_encoder import NUM_IMAGE_TOKENS, images, turns


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = make_tiny_llava(tmp_path_factory.mktemp("llava"))
    return load_tiny_llava(folder)[1]


def test_runs_are_the_tokens_in_order_with_answers_and_images_apart(processor: Any) -> None:
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    read = encoder.encode(turns("<image>\nWhat color?", "Red.", "Where?", "Left of it."), images(1))
    runs = token_runs(processor.tokenizer, read.token_ids, read.answer_mask, processor.image_token_id)
    assert [run.part for run in runs] == ["text", "image", "text", "answer", "text", "answer"]
    assert [run.start for run in runs][:2] == [0, int(read.image_positions[0])]
    assert sum(len(run.texts) for run in runs) == len(read.token_ids)
    assert len(runs[1].texts) == NUM_IMAGE_TOKENS
    assert "".join(runs[3].texts).strip().startswith("Red.")
    whole = "".join(text for run in runs for text in run.texts)
    assert whole == processor.tokenizer.decode(read.token_ids, skip_special_tokens=False)


def test_parts_of_a_character_are_shown_by_the_tokens_own_names(processor: Any) -> None:
    ids = processor.tokenizer("a \N{CAT FACE} b", add_special_tokens=False)["input_ids"]
    texts = token_texts(processor.tokenizer, ids)
    assert len(texts) == len(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert "".join(texts).startswith("a")
    assert all(texts)


def test_the_space_before_a_word_belongs_to_its_token_whatever_the_decoder_drops_at_the_start() -> None:
    class DropsFirstSpace:
        """As tokenizers of SentencePiece do."""

        words = ("<s>", " A", " red", " square")

        def decode(self, ids: list[int], **_: bool) -> str:
            return "".join(self.words[token] for token in ids).removeprefix(" ")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.words[token]

    assert token_texts(DropsFirstSpace(), [0, 1, 2, 3, 3]) == ["<s>", " A", " red", " square", " square"]


def test_a_conversation_without_answers_or_images_is_one_run(processor: Any) -> None:
    ids = torch.tensor(processor.tokenizer("What is it?", add_special_tokens=False)["input_ids"])
    (run,) = token_runs(processor.tokenizer, ids, torch.zeros(len(ids), dtype=torch.bool), processor.image_token_id)
    assert (run.part, run.start, "".join(run.texts)) == ("text", 0, "What is it?")
