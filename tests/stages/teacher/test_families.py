"""Each model family from packed samples to decoded maps, against eager attention on the processor's own outputs.

The reference takes the inputs from the library's processor as it gives them, one sample at a time and unpadded, and
the maps from `output_attentions`.
"""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from stages.attention.capture import AttentionCapture
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.families.batch import batch_inputs, join_pixels, pixels_of
from stages.families.registry import FAMILIES, family_of
from stages.images import decode_image
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.codecs.answer_logits import AnswerLogits, AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.sinks import sink_keep_mask
from storage.errors import UserError
from tests.stages.extracted_families import LAYERS, eager, eager_maps, extract_family, make_samples, processed
from tests.tiny_families import ALL_RECIPES, RECIPES

CAUSAL = sorted(name for name in RECIPES if FAMILIES[name].causal_image_tokens)


@pytest.mark.parametrize("model_type", RECIPES)
def test_stored_maps_and_logits_are_those_of_eager_attention(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    model, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    made_from = extracted.store.manifest.fingerprint
    codec = MapCodec.of_layers(made_from.map_codec, made_from.layers, made_from.windows)
    for stored, targets, maps in extracted.rows.values():
        inputs = processed(processor, stored)
        assert targets.token_ids.tolist() == inputs["input_ids"][0].tolist()
        expected_LNN, logits_TV = eager_maps(model, inputs)
        assert (maps is None) == (not stored.images)
        if maps is not None:
            found_LNN = codec.decode(maps)
            torch.testing.assert_close(found_LNN, expected_LNN, atol=1e-5, rtol=1e-3)
            assert expected_LNN.std() > 1e-3, "flat maps would prove nothing"
            keep_WNN = sink_keep_mask(expected_LNN.mean(0, keepdim=True))
            _, stored_WNN = codec.decode_windows(maps)
            assert (keep_WNN != stored_WNN).float().mean() < 1e-3, "entries at the threshold may fall to either side"
        rows_R = targets.answer_mask.nonzero()[:, 0] - 1
        assert_same_logits(AnswerLogitsCodec(made_from.logit_codec).decode(targets.logits_RQ), logits_TV[rows_R])


def assert_same_logits(found: AnswerLogits, logits_RV: Tensor) -> None:
    """The whole vocabulary is stored, so every log-probability can be compared."""
    expected_RV = logits_RV.log_softmax(-1)
    expected_RK = expected_RV.gather(1, found.ids_RK.long())
    assert found.ids_RK.shape[1] == logits_RV.shape[1]
    torch.testing.assert_close(found.logprobs_RK.float(), expected_RK, atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("model_type", RECIPES)
def test_captured_maps_of_a_ragged_batch_are_within_float_rounding_of_eager_attention(
    model_type: str, extract: Any
) -> None:
    extracted = extract(model_type)
    teacher = load_teacher(TeacherConfig(checkpoint=str(extracted.checkpoint), layers=LAYERS))
    encoded = [
        teacher.encoder.encode(stored.record["conversations"], [decode_image(image) for image in stored.images])
        for stored, *_ in extracted.rows.values()
    ]
    inputs = batch_inputs(
        teacher.identity.family,
        teacher.encoder.image_token_id,
        [item.token_ids for item in encoded],
        [item.pixel_inputs for item in encoded],
    )
    capture = AttentionCapture(layers=frozenset(LAYERS), positions=[item.image_positions for item in encoded])
    with torch.inference_mode():
        teacher.model.model(**inputs, capture=capture, use_cache=False)
    model, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    for row, (stored, *_) in enumerate(extracted.rows.values()):
        expected_LNN, _ = eager_maps(model, processed(processor, stored))
        n = expected_LNN.shape[-1]
        for number, layer in enumerate(LAYERS):
            torch.testing.assert_close(capture.maps[layer][row, :n, :n], expected_LNN[number], atol=5e-6, rtol=0)
            assert not capture.maps[layer][row, n:].any()


@pytest.mark.parametrize("model_type", RECIPES)
def test_conversations_about_one_image_share_maps_and_others_have_their_own(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    rows_of_images: dict[tuple[bytes, ...], set[int | None]] = {}
    for stored, targets, _ in extracted.rows.values():
        rows_of_images.setdefault(stored.images, set()).add(targets.map_row)
    assert rows_of_images.pop(()) == {None}
    assert sorted(map(len, rows_of_images.values())) == [1, 1, 1]
    assert extracted.store.commits[0].num_maps == 3
    assert extracted.store.commits[0].num_map_references == 4


@pytest.mark.parametrize("model_type", RECIPES)
def test_a_map_covers_all_image_tokens_of_its_sample(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    image_token_id = extracted.store.manifest.fingerprint.teacher_config.get("image_token_id")
    image_token_id = image_token_id or extracted.store.manifest.fingerprint.teacher_config["image_token_index"]
    sizes = {}
    for stored, targets, maps in extracted.with_maps:
        assert maps.num_tokens == int((targets.token_ids == image_token_id).sum())
        sizes[stored.images] = maps.num_tokens
    ragged = len(set(sizes.values())) > 1
    assert ragged, f"all samples have {sizes.values()} image tokens, which would prove nothing of ragged ones"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_maps_of_causal_families_are_zero_above_the_diagonal(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    codec = extracted.store.manifest.fingerprint.map_codec
    assert codec.causal
    for _, _, maps in extracted.with_maps:
        assert maps.codes_LC.shape[1] == maps.num_tokens * (maps.num_tokens + 1) // 2


def test_gemma3_image_tokens_attend_within_their_image_in_both_directions_and_the_square_is_stored(
    extract: Any,
) -> None:
    extracted = extract("gemma3")
    codec = extracted.store.manifest.fingerprint.map_codec
    assert not codec.causal
    images = set()
    for stored, _, maps in extracted.with_maps:
        n = maps.num_tokens
        assert maps.codes_LC.shape[1] == n * n
        maps_LNN = MapCodec(codec).decode(maps)
        per_image = n // len(stored.images)
        images.add(len(stored.images))
        for first in range(0, n, per_image):
            own = slice(first, first + per_image)
            assert bool((maps_LNN[:, own, own] > 0).all())
            assert not maps_LNN[:, own, first + per_image :].any(), "an image does not see a later one"
    assert images == {1, 2}


@pytest.mark.parametrize("model_type", sorted(set(RECIPES) - set(CAUSAL)))
def test_maps_do_not_depend_on_what_follows_the_image(model_type: str, extract: Any) -> None:
    """The premise of sharing maps where attention is not causal."""
    extracted = extract(model_type)
    model, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    same_image = [stored for stored, _, _ in extracted.with_maps if len(stored.images) == 1]
    by_image: dict[tuple[bytes, ...], list[Tensor]] = {}
    for stored in same_image:
        by_image.setdefault(stored.images, []).append(eager_maps(model, processed(processor, stored))[0])
    first, second = next(maps for maps in by_image.values() if len(maps) == 2)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_gemma4_image_tokens_attend_in_both_directions_in_sliding_layers_alone(extract: Any) -> None:
    extracted = extract("gemma4")
    for _, _, maps in extracted.with_maps:
        whole_NN, sliding_NN = MapCodec(extracted.store.manifest.fingerprint.map_codec).decode(maps)
        assert not whole_NN.triu(1).any()
        assert bool(sliding_NN.triu(1).any())


def test_a_gemma4_that_looks_backwards_alone_is_captured_too(tmp_path: Path) -> None:
    """As the smaller ones are, which have neither experts nor keys that are values."""
    recipe = RECIPES["gemma4"]
    others = {"use_bidirectional_attention": None, "enable_moe_block": False, "attention_k_eq_v": False}
    changed = replace(recipe, config={**recipe.config, "text_config": {**recipe.config["text_config"], **others}})
    extracted = extract_family("gemma4", make_samples(tmp_path), tmp_path, changed)
    assert extracted.store.manifest.fingerprint.prefix_reuse
    model, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    for stored, _, maps in extracted.with_maps:
        found_LNN = MapCodec(extracted.store.manifest.fingerprint.map_codec).decode(maps)
        expected_LNN, _ = eager_maps(model, processed(processor, stored))
        torch.testing.assert_close(found_LNN, expected_LNN, atol=1e-5, rtol=1e-3)
        assert not found_LNN.triu(1).any()


def test_gemma3_layers_with_a_window_see_only_part_of_an_earlier_image(extract: Any) -> None:
    """What the store then holds is what the layer did: zeros beyond the window."""
    extracted = extract("gemma3")
    codec = extracted.store.manifest.fingerprint.map_codec
    maps = next(maps for stored, _, maps in extracted.with_maps if len(stored.images) == 2)
    whole, sliding = MapCodec(codec).decode(maps)
    own = maps.num_tokens // 2
    assert bool((whole[own:, :own] > 0).all())
    assert not bool((sliding[own:, :own] > 0).all())


@pytest.mark.parametrize("model_type", RECIPES)
def test_the_vision_tower_and_adapter_are_saved_whole_and_nothing_of_the_decoder(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    saved = load_file(extracted.store.teacher_folder() / "model.safetensors")
    model = eager(extracted.checkpoint)
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in decoder and id(parameter) not in head
    }
    assert expected <= set(saved)
    assert not {name for name in saved if "language_model" in name or "text_model" in name or "lm_head" in name}


@pytest.mark.parametrize("model_type", RECIPES)
def test_the_processor_saved_with_the_targets_makes_the_same_inputs(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    first, again = (load_processor(folder) for folder in (extracted.checkpoint, extracted.store.teacher_folder()))
    for stored, *_ in extracted.rows.values():
        expected, found = processed(first, stored), processed(again, stored)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("model_type", RECIPES)
def test_pixels_made_alone_are_those_of_the_conversation_also_in_another_process(model_type: str, extract: Any) -> None:
    extracted = extract(model_type)
    family = family_of(model_type)
    processor = pickle.loads(pickle.dumps(load_processor(extracted.checkpoint)))
    encoder = ConversationEncoder(processor, AutoConfig.from_pretrained(extracted.checkpoint).image_token_id, 2048)
    for stored, *_ in extracted.rows.values():
        images = [decode_image(image) for image in stored.images]
        expected = encoder.encode(stored.record["conversations"], images).pixel_inputs
        found = pixels_of(family, processor, images)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"'bert' is not a known teacher family; known: gemma3, gemma4, .*idefics3"):
        family_of("bert")
    assert set(ALL_RECIPES) | {"llava"} == set(FAMILIES)


def test_a_pixel_input_that_the_family_does_not_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"\['image_sizes'\].* takes \['pixel_values'\]"):
        join_pixels(
            family_of("internvl"), [{"pixel_values": torch.zeros(1, 3, 2, 2), "image_sizes": torch.zeros(1, 2)}]
        )


def test_padding_is_never_the_image_token() -> None:
    inputs = batch_inputs(family_of("llava"), 0, [torch.tensor([0, 5, 6]), torch.tensor([7])], [{}, {}])
    assert inputs["input_ids"].tolist() == [[0, 5, 6], [7, 1, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
