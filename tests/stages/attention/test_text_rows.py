"""Attention from text to image tokens is what eager attention gives, in every family, and disturbs no map."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from stages.attention.capture import AttentionCapture, enable_capture
from stages.attention.text_rows import AnswerQueries, answer_attention, text_rows
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.families.batch import batch_inputs
from stages.families.registry import family_of
from tests.checkpoints import load_tiny_llava, make_tiny_llava
from tests.stages.extracted_families import attentions_by_layer
from tests.tiny_families import RECIPES, make_tiny_family, softmax_layers

LAYERS = {0, 2, 3}


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
    layers = frozenset(LAYERS & softmax_layers(family.name))
    plain, both = AttentionCapture(layers, images), AttentionCapture(layers, images, rows)
    with torch.no_grad():
        without = model(**inputs, capture=plain, use_cache=False).logits
        logits = model(**inputs, capture=both, use_cache=False).logits
        eager = AutoModelForImageTextToText.from_pretrained(
            family, dtype=torch.float32, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
        ).eval()
        expected = eager(**inputs, output_attentions=True, use_cache=False).attentions
        expected = attentions_by_layer(model, expected)
    assert torch.equal(logits, without)
    assert not plain.text_maps
    for layer in layers:
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


def test_answer_attention_is_the_mean_of_each_answers_rows_in_every_family_without_any_map(family: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(family, dtype=torch.float32).eval()
    enable_capture(model)
    inputs, images, rows = two_samples(family, model)
    # The rows of one answer are taken for those of two answers.
    sizes = [(2, len(rows[0]) - 2), (len(rows[1]),)]
    queries = [AnswerQueries(*one) for one in zip(rows, sizes, images, strict=True)]
    layers = frozenset(LAYERS & softmax_layers(family.name))
    by_row = AttentionCapture(layers, images, rows)
    alone = AttentionCapture(layers, [at[:0] for at in images], answers=queries)
    both = AttentionCapture(layers, images, answers=queries)
    with torch.no_grad():
        logits = [model(**inputs, capture=one, use_cache=False).logits for one in (by_row, alone, both)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not alone.maps
    for layer in layers:
        assert torch.equal(both.maps[layer], by_row.maps[layer])
        first_UN, second_UN = by_row.text_maps[layer]
        expected = [torch.stack([first_UN[:2].mean(0), first_UN[2:].mean(0)]), second_UN.mean(0, keepdim=True)]
        for found in (alone.answer_maps[layer], both.answer_maps[layer]):
            torch.testing.assert_close(found, tuple(expected), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_gradient_of_answer_attention_is_that_of_the_textbook_in_float64(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 30, 8, generator=generator, dtype=torch.float64) for h in (6, 2))
    allowed = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    if is_masked:
        allowed[0, 0, :, 5:9] = False
    nothing = torch.zeros(0, dtype=torch.long)
    queries = [
        # Its second image lies between the two answers, so the first answer does not see it.
        AnswerQueries(torch.tensor([9, 10, 20, 21, 22]), (2, 3), torch.tensor([3, 4, 5, 14, 15])),
        AnswerQueries(nothing, (), torch.arange(10, 14)),
    ]
    leaves = [[tensor.clone().requires_grad_() for tensor in (query, key)] for _ in range(2)]
    found, none = answer_attention(*leaves[0], allowed if is_masked else None, queries, 0.25)
    scores = leaves[1][0] @ leaves[1][1].repeat_interleave(3, 1).transpose(2, 3) * 0.25
    exact = scores.masked_fill(~allowed, -torch.inf).softmax(-1).mean(1)[0]
    expected = torch.stack([exact[rows][:, queries[0].images_N].mean(0) for rows in ([9, 10], [20, 21, 22])])
    assert none.shape == (0, 4)
    assert found[0, 3:].tolist() == [0, 0]
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-12)
    weights = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for values in (found, expected):
        (values * weights).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert float(ours.grad.abs().max()) > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-15, rtol=1e-10)


def test_activation_checkpointing_keeps_the_gradient_of_answer_attention(tmp_path: Path) -> None:
    model = load_tiny_llava(make_tiny_llava(tmp_path / "m"))[0]
    enable_capture(model)
    ids = torch.arange(10, 50)[None].clone()
    ids[0, 3:19] = model.config.image_token_id
    queries = [AnswerQueries(torch.arange(30, 38), (3, 5), torch.arange(3, 19))]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        capture = AttentionCapture(LAYERS, [torch.zeros(0, dtype=torch.long)], answers=queries)
        model.train()(input_ids=ids, pixel_values=pixels, capture=capture, use_cache=False)
        torch.stack([capture.answer_maps[layer][0].square().sum() for layer in LAYERS]).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[0], gradients[1])
