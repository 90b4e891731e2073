from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stages.evaluation.caption_pairs import CaptionPair
from stages.evaluation.logprobs import RowReader
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation import logprobs as rows_module
from stages.families.registry import family_of
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from storage.errors import UserError
from tests.tiny_families import RECIPES, make_tiny_family


@pytest.fixture(autouse=True)
def _in_inference_mode() -> Any:
    with torch.inference_mode():
        yield


def groups_of(encoder: ConversationEncoder, pairs: Sequence[CaptionPair]) -> list[list[EncodedConversation]]:
    groups = []
    for pair in pairs:
        image = Image.open(pair.image).convert("RGB")
        captions = (pair.caption, pair.negative_caption)
        groups.append([encoder.encode_pair("Describe.", text, [image]) for text in captions])
    return groups


def full_logits(model: Any, item: EncodedConversation) -> Tensor:
    return model(input_ids=item.token_ids[None], **item.pixel_inputs).logits[0]


def test_logits_at_chosen_rows_equal_those_of_the_whole_model_without_padding(
    model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 4)
    groups = groups_of(encoder, pairs)
    items = [item for group in groups for item in group]
    rows = [torch.arange(len(item.token_ids) - 3, len(item.token_ids)) for item in items]
    reader = RowReader(model)
    hidden_RH = reader.hidden(groups, rows)
    expected_RV = torch.cat([full_logits(model, item)[row] for item, row in zip(items, rows, strict=True)])
    torch.testing.assert_close(model.lm_head(hidden_RH), expected_RV, rtol=1e-4, atol=1e-4)
    ids_RK = torch.arange(len(hidden_RH))[:, None] + torch.tensor([0, 5])
    expected_RK = expected_RV.log_softmax(-1).gather(1, ids_RK)
    torch.testing.assert_close(reader.log_probs(hidden_RH, ids_RK), expected_RK, rtol=1e-4, atol=1e-4)


def test_an_image_goes_through_the_vision_tower_once(
    model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    groups = groups_of(encoder, pairs)
    RowReader(model).hidden(groups, [torch.tensor([0])] * 2 * len(pairs))
    assert seen == [len(pairs)]


def test_sequences_without_an_image_and_with_several_are_told_apart(
    model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    first, second = (Image.open(pair.image).convert("RGB") for pair in pairs[:2])
    groups = [
        [encoder.encode_prompt("Describe.", [first])],
        [encoder.encode_prompt("Hello, what is a square?", [])],
        [
            encoder.encode_prompt("Compare.", [second, first]),
            encoder.encode_prompt("Which?", [second, first]),
        ],
        [encoder.encode_prompt("Describe it.", [second])],
    ]
    items = [item for group in groups for item in group]
    rows = [torch.tensor([len(item.token_ids) - 1]) for item in items]
    hidden_RH = RowReader(model).hidden(groups, rows)
    expected_RV = torch.stack([full_logits(model, item)[-1] for item in items])
    torch.testing.assert_close(model.lm_head(hidden_RH), expected_RV, rtol=1e-4, atol=1e-4)


def test_no_logits_of_a_whole_sequence_exist(
    model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    reader = RowReader(model)
    groups = groups_of(encoder, pairs)
    reader.check_head(groups[0][0])
    hidden_RH = reader.hidden(groups, [torch.tensor([3])] * 2 * len(pairs))
    reader.log_probs(hidden_RH, torch.zeros(len(hidden_RH), 1, dtype=torch.long))
    assert sizes == [model.config.text_config.hidden_size * count for count in (1, 1, 2 * len(pairs))]


def test_a_model_that_changes_its_logits_after_the_head_is_refused(
    model: Any, encoder: ConversationEncoder, pairs: list[CaptionPair]
) -> None:
    item = groups_of(encoder, pairs[:1])[0][0]
    reader = RowReader(model)
    reader.check_head(item)
    forward = model.forward

    def capped(**inputs: Any) -> Any:
        outputs = forward(**inputs)
        outputs.logits = outputs.logits.tanh()
        return outputs

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits after the head"):
        reader.check_head(item)


def test_a_model_without_a_head_is_refused() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

        @property
        def base_model(self) -> nn.Module:
            return self

    with pytest.raises(UserError, match="no language modelling head"):
        RowReader(Headless())


def test_a_family_with_grids_and_positions_in_three_axes_is_read_as_well() -> None:
    image_token_id = 5
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=image_token_id,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).eval()
        pixels = [torch.randn(4 * count, 3 * 2 * 4 * 4) for count in (4, 6)]
    grids = [torch.tensor([[1, 4, 4]]), torch.tensor([[1, 4, 6]])]

    def item(number: int, text: list[int]) -> EncodedConversation:
        count = len(pixels[number]) // 4
        token_ids = torch.tensor([9, 6, *[image_token_id] * count, 7, *text])
        return EncodedConversation(
            token_ids=token_ids,
            answer_mask=torch.zeros_like(token_ids).bool(),
            pixel_inputs={"pixel_values": pixels[number], "image_grid_thw": grids[number]},
            image_positions=torch.arange(2, 2 + count),
        )

    groups = [[item(0, [10]), item(0, [11, 12, 13])], [item(1, [14, 15]), item(1, [16])]]
    items = [one for group in groups for one in group]
    reader = RowReader(model)
    reader.check_head(items[0])
    hidden_RH = reader.hidden(groups, [torch.tensor([len(one.token_ids) - 1]) for one in items])
    for hidden_H, one in zip(hidden_RH, items, strict=True):
        types = (one.token_ids == image_token_id).int()[None]
        logits = model(input_ids=one.token_ids[None], mm_token_type_ids=types, **one.pixel_inputs).logits
        torch.testing.assert_close(model.lm_head(hidden_H), logits[0, -1], rtol=1e-4, atol=1e-5)


def test_a_student_whose_vocabulary_ends_before_the_image_token_is_read_as_well(
    encoder: ConversationEncoder, pairs: list[CaptionPair], model: Any
) -> None:
    config = CompoDistillStudentConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config={**model.config.text_config.to_dict(), "hidden_size": 24},
        adapter_hidden_size=32,
        image_token_index=10_000,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = CompoDistillStudentForConditionalGeneration(config).eval()
    groups = groups_of(encoder, pairs[:2])
    for group in groups:
        for item in group:
            item.token_ids[item.image_positions] = 10_000
    items = [item for group in groups for item in group]
    rows = [torch.tensor([len(item.token_ids) - 1]) for item in items]
    reader = RowReader(student)
    reader.check_head(items[0])
    expected_RV = torch.stack([full_logits(student, item)[-1] for item in items])
    torch.testing.assert_close(student.lm_head(reader.hidden(groups, rows)), expected_RV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", RECIPES)
def test_teachers_of_every_family_are_read_row_by_row(model_type: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_family(tmp_path, model_type)
    family_model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = load_processor(checkpoint)
    image_token_id = family_model.config.image_token_id
    encoder = ConversationEncoder(processor, image_token_id, 2048)
    pictures = [Image.new("RGB", size, color) for size, color in (((90, 30), "red"), ((64, 64), "blue"))]
    groups = [[encoder.encode_pair("What?", text, [picture]) for text in ("A", "A red.")] for picture in pictures]
    items = [item for group in groups for item in group]
    reader = RowReader(family_model)
    modality = family_of(model_type).modality_input
    reader.check_head(items[0])
    hidden_RH = reader.hidden(groups, [torch.tensor([len(item.token_ids) - 1]) for item in items])
    for hidden_H, item in zip(hidden_RH, items, strict=True):
        types = {modality: (item.token_ids == image_token_id).long()[None]} if modality else {}
        logits = family_model(input_ids=item.token_ids[None], **types, **item.pixel_inputs).logits
        torch.testing.assert_close(family_model.lm_head(hidden_H), logits[0, -1], rtol=1e-4, atol=1e-4)
