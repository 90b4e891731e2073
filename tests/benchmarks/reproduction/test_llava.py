import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.reproduction.llava import build_tokenizer, save_llava, write_questions
from benchmarks.reproduction.model import Answerer, DecoderSize, LocalTower
from benchmarks.reproduction.scenes import WORDS, Scenes, ask, draw_scenes
from benchmarks.reproduction.tower import rendered

SIZE = DecoderSize(layers=2, width=32)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes("train", 0, 20)


def new_answerer(scenes: Scenes, seed: int = 0) -> Answerer:
    return Answerer(SIZE, len(ask(scenes).kind_R), seed)


def new_tower() -> LocalTower:
    """With a last norm that would show, were it applied."""
    tower = LocalTower(0).eval()
    torch.nn.init.normal_(tower.siglip.post_layernorm.weight, generator=torch.Generator().manual_seed(0))
    return tower


def test_a_stock_llava_of_the_same_weights_gives_the_same_logits(scenes: Scenes, tmp_path: Path) -> None:
    tower, answerer, questions = new_tower(), new_answerer(scenes).eval(), ask(scenes)
    save_llava(tmp_path, tower, answerer)
    llava, processor = (cls.from_pretrained(tmp_path) for cls in (AutoModelForImageTextToText, AutoProcessor))
    pixels = next(rendered(scenes, 0))[:2]
    with torch.no_grad():
        features_BNd = tower(torch.from_numpy(pixels))
        expected_BRV = answerer(features_BNd, torch.from_numpy(questions.asked_BR3[:2])).logits_BRV
        for picture in range(2):
            for number in (0, 6, 13):
                words = " ".join(WORDS[word] for word in questions.asked_BR3[picture, number])
                content = [{"type": "image"}, {"type": "text", "text": words}]
                text = processor.apply_chat_template([{"role": "user", "content": content}])
                inputs = processor(text=text, images=Image.fromarray(pixels[picture]), return_tensors="pt")
                logits_V = llava(**inputs).logits[0, -1]
                torch.testing.assert_close(logits_V, expected_BRV[picture, number], atol=1e-5, rtol=0)
                image = llava.get_image_features(inputs["pixel_values"]).pooler_output[0]
                torch.testing.assert_close(image, answerer.adapter(features_BNd[picture]), atol=1e-5, rtol=0)


def test_every_word_is_one_token_with_its_own_id() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(WORDS)
    assert tokenizer(" ".join(WORDS))["input_ids"] == list(range(len(WORDS)))


def test_records_ask_all_questions_about_pictures_with_the_pixels_that_the_tower_saw(
    scenes: Scenes, tmp_path: Path
) -> None:
    records = json.loads(write_questions(tmp_path, scenes, 3).read_text())
    questions = ask(scenes)
    assert len(records) == questions.answer_BR.size
    assert [turn["value"].split()[-1] for turn in records[0]["conversations"]] == [
        "?",
        WORDS[questions.answer_BR[0, 0]],
    ]
    seen = np.concatenate(list(rendered(scenes, 3)))
    stored = [np.asarray(Image.open(tmp_path / f"{number:06d}.png")) for number in range(len(scenes))]
    assert (np.stack(stored) == seen).all()
