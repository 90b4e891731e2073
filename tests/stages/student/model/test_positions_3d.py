"""Students of teachers whose image tokens have positions of three axes (Qwen-VL, GLM-4V): the decoder has them too."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation.answering.prefix_model import PrefixModel, SharedFront
from stages.families.registry import FAMILIES
from stages.student.model.build import build_student
from stages.student.model.inputs import model_inputs
from stages.student.model.loading import load_student
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from tests.checkpoints import draw_random_image, make_tiny_lm
from tests.stages.student.model.rotary_textbook import positions_by_hand, rotary_by_hand, sizes_of
from tests.tiny_families import RECIPES, make_tiny_family

QUICK = ("qwen2_5_vl", "qwen3_vl")
ALL = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in sorted(RECIPES)
    if FAMILIES[name].rotary_axes is not None
]
SIZES = ((90, 30), (48, 48), (40, 100))
QUESTIONS = ("Is it red?", "What is the color of the square that is left of the green triangle?", "And?")


@dataclass(frozen=True)
class Made:
    """A tiny teacher's checkpoint, what a target store keeps of it, and a decoder."""

    checkpoint: Path
    kept: Path
    decoder: Path

    def student(self, **settings: Any) -> Any:
        return build_student(self.kept, self.decoder, seed=0, **settings).eval()

    def prompts(self, model: Any) -> list[EncodedConversation]:
        """One image each of other sizes, two images, and text only."""
        encoder = ConversationEncoder(load_processor(self.checkpoint), model.config.image_token_id, 10_000)
        rng = random.Random(0)
        images = [draw_random_image(rng).resize(size) for size in SIZES]
        one_each = [encoder.encode_prompt(text, [image]) for text, image in zip(QUESTIONS, images, strict=True)]
        both = encoder.encode_prompt("<image>\nLike this?\n<image>\nOr this?", images[:2])
        return [*one_each, both, encoder.encode_prompt(QUESTIONS[1], [])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    def make(model_type: str) -> Made:
        folder = tmp_path_factory.mktemp(model_type)
        checkpoint = make_tiny_family(folder / "checkpoint", model_type)
        (folder / "teacher").mkdir()
        load_teacher(TeacherConfig(checkpoint=str(checkpoint))).save_vision(folder / "teacher")
        # Twice as many rotary frequencies as the teacher has.
        decoder = make_tiny_lm(folder / "lm", tokenizer_from=checkpoint, num_layers=2, hidden=32, heads=2)
        return Made(checkpoint, folder / "teacher", decoder)

    return cache(make)


def seen_by_layers(student: Any, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The rotary embedding that each layer turns by."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        seen.append(kwargs["position_embeddings"])

    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in student.model.language_model.layers]
    with torch.no_grad():
        student.model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("model_type", ALL)
def test_tokens_have_the_teachers_positions_and_layers_turn_by_them(model_type: str, made: Any) -> None:
    student = made(model_type).student()
    teacher: Any = AutoModelForImageTextToText.from_pretrained(made(model_type).checkpoint).eval()
    seen: list[Tensor] = []
    teacher.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    assert student.config.mrope_section == [2, 2, 4]
    assert student.config.mrope_interleaved == model_type.startswith("qwen3")
    for prompt in made(model_type).prompts(student)[:4]:
        with torch.no_grad():
            teacher(**model_inputs(teacher, [prompt]))
        inputs = model_inputs(student, [prompt])
        by_hand = positions_by_hand(prompt.token_ids.tolist(), student.config.image_token_id, sizes_of(student, inputs))
        assert torch.equal(by_hand, seen[-1][-3:, 0]), "the textbook is the teacher's"
        positions, deltas = student.model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"])
        assert torch.equal(positions[:, 0], by_hand)
        assert int(deltas) == int(by_hand.max()) + 1 - by_hand.shape[1]
        expected = rotary_by_hand(by_hand, [2, 2, 4], interleaved=student.config.mrope_interleaved)
        found = seen_by_layers(student, inputs)
        assert len(found) == 2
        for part, other in zip((*found[0], *found[1]), (*expected, *expected), strict=True):
            torch.testing.assert_close(part[0].double(), other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", QUICK)
def test_text_alone_gives_what_the_decoder_gives_bit_for_bit(model_type: str, made: Any) -> None:
    student = made(model_type).student()
    plain = Qwen2ForCausalLM.from_pretrained(made(model_type).decoder).eval()
    prompts = made(model_type).prompts(student)
    ids = prompts[-1].token_ids[None]
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.equal(student(input_ids=ids).logits, expected)
        # Beside a conversation with an image its positions are computed with three axes.
        three = torch.arange(ids.shape[1]).expand(3, 1, -1)
        assert torch.equal(student(input_ids=ids, position_ids=three).logits, expected)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(student.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("model_type", QUICK)
def test_a_student_with_its_teachers_decoder_gives_its_teachers_logits(
    model_type: str, made: Any, tmp_path: Path
) -> None:
    """The decoders of these teachers are a Qwen2 and a Qwen3 but for the positions (and deepstack)."""
    teacher: Any = AutoModelForImageTextToText.from_pretrained(made(model_type).checkpoint, dtype=torch.float32).eval()
    classes = {"qwen2_5_vl": (Qwen2Config, Qwen2ForCausalLM), "qwen3_vl": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[model_type]
    text = teacher.config.text_config.to_dict()
    rope = {"rope_type": "default", "rope_theta": 1e4}
    same = {name: value for name, value in text.items() if name not in ("model_type", "layer_types", "architectures")}
    decoder = model_class(config_class(**{**same, "rope_parameters": rope, "tie_word_embeddings": False}))
    decoder.model.load_state_dict(teacher.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(teacher.lm_head.state_dict())
    decoder.save_pretrained(tmp_path / "decoder")
    student: Any = build_student(made(model_type).kept, tmp_path / "decoder", seed=0).eval()
    assert student.config.mrope_section == [1, 1, 2]
    connectors = [student.model.post_connector, *getattr(student.model, "deepstack_connectors", [])]
    for connector in connectors:
        torch.nn.init.eye_(connector.weight)
        torch.nn.init.zeros_(connector.bias)
    for prompt in made(model_type).prompts(student):
        with torch.no_grad():
            expected = teacher(**model_inputs(teacher, [prompt])).logits
            found = student(**model_inputs(student, [prompt])).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def generated(student: Any, prompts: Sequence[EncodedConversation], **settings: Any) -> list[list[int]]:
    inputs = model_inputs(student, prompts, pad_left=True)
    fixed = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: list[list[int]] = student.generate(**inputs, **fixed, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def textbook_generated(student: Any, prompt: EncodedConversation, *, axes: bool = True) -> list[int]:
    """Token by token from the whole, at positions that are counted by hand."""
    inputs = model_inputs(student, [prompt])
    ids, pixels = inputs["input_ids"], {name: inputs[name] for name in student.config.pixel_inputs if name in inputs}
    for _ in range(6):
        positions = positions_by_hand(ids[0].tolist(), student.config.image_token_id, sizes_of(student, inputs))
        at = positions[:, None] if axes else torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits = student(input_ids=ids, **pixels, position_ids=at, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, -6:].tolist()


@pytest.mark.parametrize("model_type", QUICK)
def test_generation_gives_the_same_tokens_with_any_cache_without_one_and_in_a_padded_batch(
    model_type: str, made: Any
) -> None:
    student = made(model_type).student()
    prompts = made(model_type).prompts(student)
    expected = [textbook_generated(student, prompt) for prompt in prompts]
    assert expected[:4] != [textbook_generated(student, prompt, axes=False) for prompt in prompts[:4]]
    assert generated(student, prompts) == expected
    assert generated(student, prompts, use_cache=False) == expected
    assert generated(student, prompts, cache_implementation="static") == expected
    # Another batch leaves nothing behind.
    assert [generated(student, [prompt])[0] for prompt in reversed(prompts)] == expected[::-1]


def test_a_cache_can_be_gone_on_with_by_hand(made: Any) -> None:
    student = made("qwen2_5_vl").student()
    prompt = made("qwen2_5_vl").prompts(student)[0]
    inputs = model_inputs(student, [prompt])
    del inputs["attention_mask"]
    found = []
    with torch.no_grad():
        outputs = student(**inputs, use_cache=True)
        for _ in range(6):
            found.append(int(outputs.logits[0, -1].argmax()))
            outputs = student(input_ids=torch.tensor([found[-1:]]), past_key_values=outputs.past_key_values)
        assert found == textbook_generated(student, prompt)
        with pytest.raises(ValueError, match="images behind a cache's tokens are not known; give position_ids"):
            student(**inputs, past_key_values=outputs.past_key_values)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(2)
        mask = torch.ones(2, cache.get_seq_length() + 1)
        with pytest.raises(ValueError, match="2 sequences go on from a cache of 1; give position_ids"):
            student(input_ids=torch.tensor([[1], [2]]), attention_mask=mask, past_key_values=cache)


def test_a_padded_batch_gives_each_sample_its_own(made: Any) -> None:
    student = made("qwen2_5_vl").student()
    prompts = made("qwen2_5_vl").prompts(student)
    inputs = model_inputs(student, prompts)
    with torch.no_grad():
        # As training calls it, without a mask, and as evaluation does.
        unmasked = student.model(**{name: v for name, v in inputs.items() if name != "attention_mask"}, use_cache=False)
        masked = student.model(**inputs, use_cache=False)
        for row, prompt in enumerate(prompts):
            alone = student.model(**model_inputs(student, [prompt])).last_hidden_state[0]
            for together in (unmasked, masked):
                found = together.last_hidden_state[row, : len(alone)]
                torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-3)


def test_shared_fronts_are_gone_on_from_where_the_teacher_would(made: Any) -> None:
    student = made("qwen2_5_vl").student()
    encoder = ConversationEncoder(load_processor(made("qwen2_5_vl").checkpoint), student.config.image_token_id, 10_000)
    fronts = []
    for size in SIZES[:2]:
        image = draw_random_image(random.Random(1)).resize(size)
        sequences = [encoder.encode_prompt(question, [image]) for question in QUESTIONS]
        fronts.append(SharedFront(sequences, int(sequences[0].image_positions[-1]) + 1))
    with torch.inference_mode():
        prefix = PrefixModel(student)
        running = prefix.read(fronts)
        assert running.is_3d
        sequences = [(sequence, front.num_shared) for front in fronts for sequence in front.sequences]
        for hidden_Td, (sequence, start) in zip(running.hidden_BTd, sequences, strict=True):
            expected = student.model(**model_inputs(student, [sequence])).last_hidden_state[0, start:]
            torch.testing.assert_close(hidden_Td[: len(expected)], expected, atol=1e-4, rtol=1e-3)


def test_a_saved_student_is_the_same_and_one_saved_before_has_ordinary_positions(
    made: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student, ordinary = made("qwen3_vl").student(), made("qwen3_vl").student(teacher_positions=False)
    inputs = model_inputs(student, made("qwen3_vl").prompts(student)[:1])
    for name, model in (("new", student), ("before", ordinary)):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["mrope_section"], config["mrope_interleaved"]) == ([2, 2, 4], True) or name == "before"
        if name == "before":
            # As versions before wrote it.
            assert (config.pop("mrope_section"), config.pop("mrope_interleaved")) == (None, False)
            assert "mrope_section" not in config["text_config"]["rope_parameters"]
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        again = load_student(tmp_path / name).eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert "Unrecognized keys" not in capfd.readouterr().err
    assert load_student(tmp_path / "new").config.text_config.rope_parameters["mrope_section"] == [2, 2, 4]
    counted = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        found, expected = ordinary(**inputs).logits, student(**inputs, position_ids=counted).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(found, student(**inputs).logits, atol=1e-2)


def test_layers_that_do_not_take_the_positions_are_found_out(made: Any) -> None:
    student = made("qwen2_5_vl").student()
    layer = student.model.language_model.layers[1]
    layer._forward_pre_hooks.clear()
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {name: value for name, value in kwargs.items() if name != "rotary_3d"}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="do not take the rotary embedding of their tokens' 3D positions"):
        student(**model_inputs(student, made("qwen2_5_vl").prompts(student)[:1]))
