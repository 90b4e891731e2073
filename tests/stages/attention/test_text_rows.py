"""Attention from text to image tokens is what eager attention gives, in every family, and disturbs no map."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from stages.attention.capture import AttentionCapture, enable_capture
from stages.attention.text_rows import text_rows
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.families.batch import batch_inputs
from stages.families.registry import family_of
from tests.tiny_families import RECIPES, make_tiny_family

LAYERS = frozenset({0, 2, 3})


@pytest.fixture(scope="module", params=sorted(RECIPES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def two_samples(folder: Path, model: torch.nn.Module) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Inputs of two conversations of different lengths, padded, with their image tokens and answer rows."""
    config = model.config
    encoder = ConversationEncoder(load_processor(folder), config.image_token_id, 512)
    encoded = [
        encoder.encode_pair("What is it?", "A blue circle is left of a green triangle.", [Image.new("RGB", (48, 32))]),
        encoder.encode_pair("What is the color?", "Red.", [Image.new("RGB", (40, 40), "red")]),
    ]
    family = family_of(config.model_type)
    inputs = batch_inputs(
        family, config.image_token_id, [e.token_ids for e in encoded], [e.pixel_inputs for e in encoded]
    )
    return inputs, [e.image_positions for e in encoded], [e.answer_mask.nonzero()[:, 0] - 1 for e in encoded]


def test_answer_rows_equal_eager_attention_and_image_maps_keep_every_bit(family: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(family, dtype=torch.float32).eval()
    enable_capture(model)
    inputs, images, rows = two_samples(family, model)
    plain, both = AttentionCapture(LAYERS, images), AttentionCapture(LAYERS, images, rows)
    with torch.no_grad():
        without = model(**inputs, capture=plain, use_cache=False).logits
        logits = model(**inputs, capture=both, use_cache=False).logits
        eager = AutoModelForImageTextToText.from_pretrained(
            family, dtype=torch.float32, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
        ).eval()
        expected = eager(**inputs, output_attentions=True, use_cache=False).attentions
    assert torch.equal(logits, without)
    assert not plain.text_maps
    for layer in LAYERS:
        assert torch.equal(both.maps[layer], plain.maps[layer])
        for row, (queries, columns) in enumerate(zip(rows, images, strict=True)):
            wanted_UN = expected[layer][row].mean(0)[queries][:, columns]
            torch.testing.assert_close(both.text_maps[layer][row], wanted_UN, atol=5e-6, rtol=0)
            # Gemma 3's even layers look no further back than their window.
            assert layer != 3 or float(wanted_UN.max()) > 1e-4, "rows of zeros would prove nothing"


@pytest.mark.parametrize("is_masked", [False, True])
def test_rows_are_the_softmax_of_the_textbook_in_float64(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 30, 8, generator=generator, dtype=torch.float64) for h in (6, 2))
    allowed = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    if is_masked:
        allowed[0, 0, :, 5:9] = False
    images = [torch.arange(3, 12), torch.arange(10, 14)]
    queries = [torch.tensor([1, 6, 29]), torch.tensor([20])]
    found = text_rows(query, key, allowed if is_masked else None, queries, images, 0.25)
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.25
    exact = scores.masked_fill(~allowed, -torch.inf).softmax(-1).mean(1)
    for row in range(2):
        torch.testing.assert_close(found[row], exact[row][queries[row]][:, images[row]], atol=1e-15, rtol=1e-12)
        assert found[row].dtype == torch.float64


def test_a_row_without_words_or_without_an_image_is_empty() -> None:
    query, key = torch.randn(2, 2, 9, 4), torch.randn(2, 1, 9, 4)
    none = torch.zeros(0, dtype=torch.long)
    found = text_rows(query, key, None, [none, torch.tensor([8])], [torch.arange(4), none], 0.5)
    assert [tuple(rows.shape) for rows in found] == [(0, 4), (1, 0)]
