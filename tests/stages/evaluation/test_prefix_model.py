from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation.answering import prefix_model
from stages.evaluation.answering.prefix_model import PrefixModel, SharedFront
from stages.evaluation.suites.pictures import SuitePicture
from stages.families.registry import family_of
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from storage.errors import UserError
from tests.tiny_families import HYBRID, RECIPES, make_tiny_family

PROMPTS = ("What?", "What is left of the red square in the image?")


@pytest.fixture(autouse=True)
def _in_inference_mode() -> Any:
    with torch.inference_mode():
        yield


def fronts_of(encoder: ConversationEncoder, images: Sequence[Image.Image]) -> list[SharedFront]:
    """Two questions about each image, which share all up to the end of the image."""
    fronts = []
    for image in images:
        sequences = [encoder.encode_prompt(prompt, [image]) for prompt in PROMPTS]
        fronts.append(SharedFront(sequences, int(sequences[0].image_positions[-1]) + 1))
    return fronts


def sequences_of(fronts: Sequence[SharedFront]) -> list[tuple[EncodedConversation, int]]:
    return [(sequence, front.num_shared) for front in fronts for sequence in front.sequences]


def whole_logits(model: Any, item: EncodedConversation, **further: Tensor) -> Tensor:
    return model(input_ids=item.token_ids[None], **item.pixel_inputs, **further).logits[0]


def load(pictures: Sequence[SuitePicture]) -> list[Image.Image]:
    return [picture.load(10**6, "ignore") for picture in pictures]


def test_states_behind_a_shared_front_equal_those_of_the_whole_model_without_padding(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture]
) -> None:
    fronts = fronts_of(encoder, load(pictures))
    running = PrefixModel(model).read(fronts)
    for hidden_Td, (sequence, start) in zip(running.hidden_BTd, sequences_of(fronts), strict=True):
        expected_TV = whole_logits(model, sequence)[start:]
        found_TV = model.lm_head(hidden_Td[: len(expected_TV)])
        torch.testing.assert_close(found_TV, expected_TV, rtol=1e-4, atol=1e-4)


def test_an_image_goes_through_the_vision_tower_once(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture]
) -> None:
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    PrefixModel(model).read(fronts_of(encoder, load(pictures)))
    assert seen == [len(pictures)]


def test_log_probabilities_are_computed_in_blocks_of_rows(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_model, "ROWS_AT_ONCE", 3)
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    sequence = encoder.encode_prompt(PROMPTS[1], load(pictures[:1]))
    (hidden_Td,) = PrefixModel(model).whole([sequence])
    found = PrefixModel(model).log_probs(hidden_Td[-7:], torch.arange(7))
    assert sizes == [3, 3, 1]
    expected = whole_logits(model, sequence)[-7:].double().log_softmax(-1)
    torch.testing.assert_close(found.double(), expected[torch.arange(7), torch.arange(7)], rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture]
) -> None:
    sequence = encoder.encode_prompt("What?", load(pictures[:1]))
    PrefixModel(model).check_head(sequence)
    forward = model.forward

    def capped(**inputs: Any) -> Any:
        outputs = forward(**inputs)
        outputs.logits = outputs.logits.tanh()
        return outputs

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits after the head"):
        PrefixModel(model).check_head(sequence)


def test_a_model_without_a_head_is_refused() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

        @property
        def base_model(self) -> nn.Module:
            return self

    with pytest.raises(UserError, match="no language modelling head"):
        PrefixModel(Headless())


def test_a_model_that_counts_positions_otherwise_is_found_out(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture]
) -> None:
    fronts = fronts_of(encoder, load(pictures[:2]))
    assert PrefixModel(model).reads_fronts_once(fronts)
    decoder = model.model.language_model
    forward = decoder.forward
    decoder.forward = lambda *args, position_ids=None, **more: forward(
        *args, position_ids=None if position_ids is None else position_ids + 1, **more
    )
    assert not PrefixModel(model).reads_fronts_once(fronts)


def test_a_model_that_keeps_no_keys_and_values_is_found_out(
    model: Any, encoder: ConversationEncoder, pictures: list[SuitePicture]
) -> None:
    base = model.base_model
    forward = base.forward
    base.forward = lambda *args, **more: forward(*args, **(more | {"use_cache": False}))
    assert not PrefixModel(model).reads_fronts_once(fronts_of(encoder, load(pictures[:1])))


def test_a_student_whose_vocabulary_ends_before_the_image_token_is_read_as_well(
    encoder: ConversationEncoder, pictures: list[SuitePicture], model: Any
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
        student: Any = CompoDistillStudentForConditionalGeneration(config).eval()
    fronts = fronts_of(encoder, load(pictures[:2]))
    for sequence, _ in sequences_of(fronts):
        sequence.token_ids[sequence.image_positions] = 10_000
    prefix = PrefixModel(student)
    prefix.check_head(fronts[0].sequences[0])
    running = prefix.read(fronts)
    for hidden_Td, (sequence, start) in zip(running.hidden_BTd, sequences_of(fronts), strict=True):
        expected_TV = whole_logits(student, sequence)[start:]
        torch.testing.assert_close(student.lm_head(hidden_Td[: len(expected_TV)]), expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", RECIPES)
def test_models_of_every_family_are_read_from_shared_fronts(model_type: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_family(tmp_path, model_type)
    family_model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = load_processor(checkpoint)
    image_token_id = family_model.config.image_token_id
    encoder = ConversationEncoder(processor, image_token_id, 2048)
    # Of one size: families that cut images into tiles join only images of equal shape.
    images = [Image.new("RGB", (90, 30), color) for color in ("red", "blue")]
    fronts = fronts_of(encoder, images)
    modality = family_of(model_type).modality_input
    prefix = PrefixModel(family_model)
    prefix.check_head(fronts[0].sequences[0])
    # Where a layer keeps a state instead of keys and values, or what follows an image needs its pixels, every
    # conversation is read as a whole.
    shares = model_type not in HYBRID and family_of(model_type).why_no_prefix() is None
    assert prefix.reads_fronts_once(fronts) == shares
    if not shares:
        return
    running = prefix.read(fronts)
    for hidden_Td, (sequence, start) in zip(running.hidden_BTd, sequences_of(fronts), strict=True):
        types = {modality: (sequence.token_ids == image_token_id).long()[None]} if modality else {}
        expected_TV = whole_logits(family_model, sequence, **types)[start:]
        found_TV = prefix.head(hidden_Td[: len(expected_TV)])
        torch.testing.assert_close(found_TV, expected_TV, rtol=1e-3, atol=1e-4)
