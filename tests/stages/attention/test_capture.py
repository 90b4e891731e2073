"""Capture gives the maps that eager attention gives, and changes nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import stages.attention.capture
from stages.attention.capture import AttentionCapture, enable_capture, image_block_maps
from tests.checkpoints import load_tiny_llava, make_tiny_llava

LAYERS = frozenset({1, 3, 4})


@pytest.fixture(scope="module", params=[(4, 2), (4, 4), (4, 1)], ids=["grouped heads", "full heads", "one kv head"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads, kv_heads = request.param
    folder = tmp_path_factory.mktemp("llava")
    return make_tiny_llava(folder / "m", heads=heads, kv_heads=kv_heads)


def capturing_model(checkpoint: Path) -> LlavaForConditionalGeneration:
    model = load_tiny_llava(checkpoint)[0].eval()
    enable_capture(model)
    return model


def make_inputs(
    model: LlavaForConditionalGeneration, lengths: list[int], starts: list[int], side: str
) -> dict[str, Tensor]:
    """Rows of random text with 16 image tokens from `starts` on (counted without padding), padded on `side`."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    attention_mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        ids = torch.randint(5, 200, (length,), generator=generator)
        ids[ids == model.config.image_token_id] = 7
        ids[start : start + 16] = model.config.image_token_id
        place = slice(width - length, width) if side == "left" else slice(0, length)
        input_ids[row, place] = ids
        attention_mask[row, place] = 1
    pixels = torch.randn(len(lengths), 3, 32, 32, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}


def capture_of(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> AttentionCapture:
    positions = [(row == model.config.image_token_id).nonzero()[:, 0] for row in inputs["input_ids"]]
    return AttentionCapture(layers=LAYERS, positions=positions)


def eager_maps(checkpoint: Path, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        attentions = model.eval()(**inputs, output_attentions=True).attentions
    maps = {}
    for layer in LAYERS:
        rows = []
        for row, ids in enumerate(inputs["input_ids"]):
            positions = (ids == model.config.image_token_id).nonzero()[:, 0]
            rows.append(attentions[layer][row].mean(0)[positions][:, positions])
        maps[layer] = torch.stack(rows)
    return maps


CASES = {
    "no padding": ([40, 40], [3, 3], "right"),
    "right padding": ([40, 25], [3, 5], "right"),
    "left padding": ([25, 40], [3, 5], "left"),
    "two image positions": ([40, 40], [0, 20], "right"),
}


@pytest.mark.parametrize("case", CASES)
def test_captured_maps_equal_eager_attention(checkpoint: Path, case: str) -> None:
    model = capturing_model(checkpoint)
    inputs = make_inputs(model, *CASES[case])
    capture = capture_of(model, inputs)
    with torch.no_grad():
        model(**inputs, capture=capture)
    expected = eager_maps(checkpoint, inputs)
    assert capture.maps.keys() == LAYERS
    for layer in LAYERS:
        torch.testing.assert_close(capture.maps[layer], expected[layer], atol=5e-6, rtol=0)
        assert expected[layer].std() > 1e-3, "flat maps would prove nothing"


@pytest.mark.parametrize("case", CASES)
def test_logits_with_capture_are_bit_identical_to_plain_sdpa(checkpoint: Path, case: str) -> None:
    model = capturing_model(checkpoint)
    inputs = make_inputs(model, *CASES[case])
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        captured = model(**inputs, capture=capture_of(model, inputs)).logits
        expected = plain.eval()(**inputs).logits
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("mask", ["none", "causal", "both directions"])
@pytest.mark.parametrize("spread", ["consecutive", "two images", "every third"])
def test_blocks_of_queries_give_the_softmax_of_the_textbook(
    spread: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.attention.capture, "BLOCK_ROWS", 29)
    generator = torch.Generator().manual_seed(4)
    query, key = torch.randn(2, 6, 200, 16, generator=generator) * 2, torch.randn(2, 2, 200, 16, generator=generator)
    positions = {
        "consecutive": torch.arange(10, 160),
        "two images": torch.cat([torch.arange(3, 70), torch.arange(90, 180)]),
        "every third": torch.arange(5, 200, 3),
    }[spread]
    rows = [positions, positions[:-20]]
    allowed = torch.ones(2, 1, 200, 200, dtype=torch.bool).tril()
    if mask == "both directions":
        for row, own in enumerate(rows):
            allowed[row, 0, own[0] : own[-1] + 1, own[0] : own[-1] + 1] = True
    capture = AttentionCapture(layers=LAYERS, positions=rows)
    found = image_block_maps(query, key, None if mask == "none" else allowed, capture, 0.25)
    scores = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * 0.25
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1).mean(1).float()
    for row, own in enumerate(rows):
        n = len(own)
        torch.testing.assert_close(found[row, :n, :n], expected[row][own][:, own], atol=4.5e-8, rtol=1e-5)
        assert not found[row, n:].any()
        assert not found[row, :, n:].any()
    assert bool(found.triu(1).any()) == (mask == "both directions")


def test_rows_without_wanted_maps_stay_zero_and_do_not_disturb_others(checkpoint: Path) -> None:
    model = capturing_model(checkpoint)
    inputs = make_inputs(model, [40, 30], [3, 5], "right")
    both = capture_of(model, inputs)
    one = AttentionCapture(layers=LAYERS, positions=[both.positions[0], torch.zeros(0, dtype=torch.long)])
    with torch.no_grad():
        model(**inputs, capture=both)
        model(**inputs, capture=one)
    for layer in LAYERS:
        torch.testing.assert_close(one.maps[layer][0], both.maps[layer][0], atol=1e-7, rtol=0)
        assert not one.maps[layer][1].any()


def test_maps_are_causal_and_their_rows_sum_to_less_than_one(checkpoint: Path) -> None:
    model = capturing_model(checkpoint)
    inputs = make_inputs(model, [40], [6], "right")
    capture = capture_of(model, inputs)
    with torch.no_grad():
        model(**inputs, capture=capture)
    for maps_BNN in capture.maps.values():
        assert not maps_BNN.triu(1).any()
        assert bool((maps_BNN.sum(-1) < 1).all()), "text before the image takes a share"


def test_gradients_through_captured_maps_equal_those_through_eager_attention(checkpoint: Path) -> None:
    model = capturing_model(checkpoint)
    eager = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    inputs = make_inputs(model, [40, 25], [3, 5], "right")
    generator = torch.Generator().manual_seed(0)
    weights = {layer: torch.randn(2, 16, 16, generator=generator) for layer in sorted(LAYERS)}
    capture = capture_of(model, inputs)
    model(**inputs, capture=capture)
    sum((capture.maps[layer] * weights[layer]).sum() for layer in sorted(LAYERS)).backward()  # type: ignore[union-attr]
    attentions = eager(**inputs, output_attentions=True).attentions
    total = torch.zeros(())
    for layer in sorted(LAYERS):
        for row in range(2):
            p = capture.positions[row]
            total = total + (attentions[layer][row].mean(0)[p][:, p] * weights[layer][row]).sum()
    total.backward()
    expected = dict(eager.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and expected[name].grad is not None:
            difference = (parameter.grad - expected[name].grad).norm()
            # Keys' biases shift all scores of a row alike: their gradient is zero but for rounding.
            assert difference < 1e-5 * expected[name].grad.norm() + 1e-5, name
            compared += bool(parameter.grad.norm() > 1e-3)
    assert compared > 10


def test_maps_with_gradients_neither_read_nor_set_the_state_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in them is random, and on a GPU each look at that state is a wait, for every head of every layer."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(1, 4, 20, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    capture = AttentionCapture(layers=LAYERS, positions=[torch.arange(3, 18)])
    looks: list[str] = []
    for name in ("get_rng_state", "set_rng_state"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, o=original, n=name: (looks.append(n), o(*args))[1])
    image_block_maps(query.requires_grad_(), key, None, capture, 0.25).square().sum().backward()
    assert query.grad is not None
    assert float(query.grad.abs().sum()) > 0
    assert looks == []


def test_activation_checkpointing_keeps_the_gradient_of_captured_maps(checkpoint: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = capturing_model(checkpoint)
        inputs = make_inputs(model, [40], [3], "right")
        if checkpointing:
            model.train()
            model.activation_checkpointing_enable()
        capture = capture_of(model, inputs)
        hidden = model.model(**inputs, capture=capture, use_cache=False).last_hidden_state
        (hidden.square().sum() + capture.maps[3].square().sum() * 100).backward()
        gradients.append(model.model.language_model.layers[2].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
