import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.conversations.encoder import ConversationEncoder
from stages.images import decode_image
from tests.checkpoints import (
    load_tiny_llava,
    make_llava_data,
    make_tiny_llava,
    make_tiny_llava_without_generation_block,
    make_tiny_lm,
)


@pytest.mark.parametrize("make", [make_tiny_llava, make_tiny_llava_without_generation_block])
def test_every_sample_of_the_tiny_data_goes_through_the_tiny_llava(make: object, tmp_path: Path) -> None:
    model, processor = load_tiny_llava(make(tmp_path / "teacher"))  # type: ignore[operator]
    data, folder = make_llava_data(tmp_path / "data", 10)
    encoder = ConversationEncoder(processor, model.config.image_token_id, 512)
    samples = json.loads(data.read_text())
    assert len({sample["id"] for sample in samples}) == 10
    for sample in samples:
        images: list[Image.Image] = []
        if "image" in sample:
            images = [decode_image((folder / sample["image"]).read_bytes())]
        encoded = encoder.encode(sample["conversations"], images)
        assert len(encoded.image_positions) == 16 * len(images)
        with torch.inference_mode():
            logits = model(input_ids=encoded.token_ids[None], **encoded.pixel_inputs).logits
        assert logits.isfinite().all()


def test_equal_seeds_give_equal_weights_and_data(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_tiny_llava(tmp_path / name, seed=seed)
        make_llava_data(tmp_path / name / "data", 5, seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    data = {name: (tmp_path / name / "data" / "data.json").read_text() for name in "abc"}
    assert data["a"] == data["b"] != data["c"]


@pytest.mark.parametrize("change", [-7, 0, 9])
def test_a_students_vocabulary_may_be_shorter_or_padded(change: int, tmp_path: Path) -> None:
    make_tiny_llava(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    wanted = len(tokenizer) + change
    folder = make_tiny_lm(tmp_path / "lm", tokenizer_from=tmp_path / "teacher", vocab_size=wanted)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight.shape == (wanted, 24)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
