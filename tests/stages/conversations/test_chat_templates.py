from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from stages.checkpoints.processors import load_processor
from stages.conversations.answer_ends import notes_of_ends
from stages.conversations.chat_templates import FOLDER, image_text, read_template
from stages.conversations.encoder import ConversationEncoder
from stages.student.layer_matching import MatchingConfig
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source
from storage.targets.store import TargetStore
from tests.checkpoints import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_OF_LLAVA_1_5,
    CHATML,
    load_tiny_llava,
    make_foreign_lm,
    make_tiny_llava,
)
from tests.stages.distilled import TinyData, extract_here, make_tiny_data
from tests.tiny_families import make_tiny_family

TURNS = [
    {"from": "human", "value": "What is it?"},
    {"from": "gpt", "value": "A square."},
    {"from": "human", "value": "Its color?"},
    {"from": "gpt", "value": "Red."},
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
WITHOUT_AN_END_AFTER_THE_FIRST = CHAT_TEMPLATE.replace("+ eos_token -}}", "+ (eos_token if loop.last else '') -}}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("data"), num_samples=4)


@pytest.fixture
def processor(data: TinyData) -> Any:
    return load_tiny_llava(data.teacher)[1]


def notes(processor: Any) -> tuple[str, ...]:
    return notes_of_ends(processor, processor.image_token_id, "the chat template of X", "Mend it.")


def test_the_templates_that_come_with_the_package_end_every_answer(processor: Any) -> None:
    bundled = [file.stem for file in FOLDER.iterdir()]
    assert sorted(bundled) == ["chatml", "llama-3", "llava-1.5", "mistral"]
    # As special tokens of models that were trained on these formats.
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    for name in bundled:
        processor.chat_template = read_template(name)
        assert notes(processor) == ()


def test_the_template_of_llava_1_5_is_the_text_it_was_trained_on(processor: Any) -> None:
    processor.chat_template = read_template("llava-1.5")
    encoded = ConversationEncoder(processor, processor.image_token_id, 512).encode(TURNS, [])
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(encoded.token_ids) == (
        f"{SYSTEM}USER: What is it? ASSISTANT: A square.{end}USER: Its color? ASSISTANT: Red.{end}"
    )
    assert processor.tokenizer.decode(encoded.token_ids[encoded.answer_mask]) == f" A square.{end} Red.{end}"


@pytest.mark.parametrize(
    ("template", "num_ended"), [(CHAT_TEMPLATE_OF_LLAVA_1_5, 0), (WITHOUT_AN_END_AFTER_THE_FIRST, 1)]
)
def test_answers_without_an_end_are_noted_with_what_follows(template: str, num_ended: int, processor: Any) -> None:
    assert notes(processor) == ()
    processor.chat_template = template
    (note,) = notes(processor)
    assert note.startswith(f"the chat template of X ends {num_ended} of 2 answers of a conversation with an end token")
    assert note.endswith("it writes on until it is cut. Mend it.")


def test_a_template_that_refuses_every_conversation_is_left_to_the_ledger(processor: Any) -> None:
    processor.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert notes(processor) == ()


STRINGS = {
    "joined": CHATML,
    "printed": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "marked": "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}{% else %}"
    "{% generation %}{{ 'A: ' + m['content'] }}{% endgeneration %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", STRINGS)
def test_a_template_for_plain_strings_gets_strings_with_the_images_placeholder(name: str, processor: Any) -> None:
    processor.chat_template = STRINGS[name]
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    picture = Image.new("RGB", (40, 40), "red")
    encoded = encoder.encode([{"from": "human", "value": "<image>\nWhat?"}, *TURNS[1:]], [picture])
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in TURNS
    ]
    messages[0]["content"] = "<image>\nWhat?"
    text = processor.apply_chat_template(messages, tokenize=False)
    expected = processor(images=[picture], text=[text], return_tensors="pt")["input_ids"][0]
    torch.testing.assert_close(encoded.token_ids, expected)
    answers = {"joined": "{}<|im_end|>", "printed": "assistant: {}", "marked": "A: {}"}[name]
    seen = processor.tokenizer.decode(encoded.token_ids[encoded.answer_mask])
    assert seen == answers.format("A square.") + answers.format("Red.")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "internvl", "smolvlm"])
def test_the_placeholder_is_that_of_the_family(model_type: str, tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, model_type)
    processor: Any = load_processor(folder)
    config = AutoConfig.from_pretrained(folder)
    stock = ConversationEncoder(processor, config.image_token_id, 512)
    picture = Image.new("RGB", (40, 40), "red")
    number = len(stock.encode_prompt("What?", [picture]).image_positions)
    for template in (CHATML, read_template("chatml", image_text(processor))):
        processor.chat_template = template
        encoded = ConversationEncoder(processor, config.image_token_id, 512).encode_prompt("What?", [picture])
        assert len(encoded.image_positions) == number > 0
    text = processor.tokenizer.decode(encoded.token_ids)
    assert ("<|vision_start|><|image_pad|>" in text) == (model_type == "qwen2_vl")


def test_a_teacher_with_such_a_template_stores_one_that_everybody_can_use(tmp_path: Path) -> None:
    folder = make_tiny_llava(tmp_path / "teacher", num_layers=2, chat_template=CHATML)
    identity = identify_teacher(TeacherConfig(checkpoint=str(folder), num_matched=1), on_gpu=False, with_weights=False)
    identity.processor.save_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert text == processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True
    )


def test_a_template_is_a_file_or_the_name_of_one_that_comes_with_the_package(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("é", encoding="utf-8")
    assert read_template(str(own)) == "é"
    for missing in (str(tmp_path), str(tmp_path / "none.jinja"), "llava-1.6"):
        with pytest.raises(UserError, match=r"cannot be read: .*that come with the package: chatml, .*, mistral$"):
            read_template(missing)


def store_of(data: TinyData, out: Path, template: str) -> TargetStore:
    return extract_here(data, out, layers=(2, 3), num_matched=1, chat_template=template)


def start_of(data: TinyData, store: TargetStore, student: Path, kd_weight: float) -> StageSetup:
    config = TrainConfig(
        matching=MatchingConfig(num_matched=1), dft=DistilledFinetuning(kd_weight=kd_weight, batch_size=4)
    )
    source = Source(SampleSet.open(data.samples), store)
    return StageSetup(StageRun("dft", config, str(student), None, (source,), data.samples.parent / "out"))


def test_targets_and_students_have_the_template_that_was_set_whatever_the_tokenizers_own(
    data: TinyData, tmp_path: Path
) -> None:
    store = store_of(data, tmp_path / "store", "llava-1.5")
    stored = load_processor(store.teacher_folder())
    assert stored.chat_template == store.manifest.fingerprint.chat_template == read_template("llava-1.5")
    start = start_of(data, store, data.student_lm, kd_weight=1.0)
    assert start.processor.chat_template == read_template("llava-1.5")
    assert start.notes == []


def test_a_student_of_answers_without_an_end_is_told_so_before_it_is_loaded(data: TinyData, tmp_path: Path) -> None:
    template = tmp_path / "stock.jinja"
    template.write_text(CHAT_TEMPLATE_OF_LLAVA_1_5)
    store = store_of(data, tmp_path / "store", str(template))
    (note,) = start_of(data, store, data.student_lm, kd_weight=1.0).notes
    assert note.startswith(f"the chat template that {store.store.url} was made with ends 0 of 2 answers")

    foreign = make_foreign_lm(tmp_path / "foreign", None)
    *_, note = start_of(data, store, foreign, kd_weight=0.0).notes
    assert note.startswith(f"the chat template that {foreign} reads with ends 0 of 2 answers")


def test_a_students_own_tokens_are_judged_by_its_own_template(data: TinyData, tmp_path: Path) -> None:
    store = store_of(data, tmp_path / "store", "llava-1.5")
    foreign = make_foreign_lm(tmp_path / "foreign", CHATML.replace("<|im_end|>", ""))
    *_, note = start_of(data, store, foreign, kd_weight=0.0).notes
    assert note.startswith(f"the chat template that {foreign} reads with ends 0 of 2 answers")


def test_a_template_for_plain_strings_that_leaves_images_out_does_for_text(processor: Any) -> None:
    processor.chat_template = CHATML.replace("message['content'] +", "message['content'].replace('<image>\\n', '') +")
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    assert "<|im_start|>user\nWhat is it?<|im_end|>" in processor.tokenizer.decode(encoder.encode(TURNS, []).token_ids)
    with pytest.raises(UnusableSample, match="image_count_mismatch"):
        encoder.encode([{"from": "human", "value": "<image>\nWhat?"}, *TURNS[1:]], [Image.new("RGB", (40, 40), "red")])


def test_a_template_that_fails_either_way_is_refused_with_both_errors(processor: Any) -> None:
    processor.chat_template = CHATML + "{{ 1 / 0 }}"
    with pytest.raises(
        UserError, match=r"answer: ZeroDivisionError: .*; with turns made of parts: TypeError: can only"
    ):
        ConversationEncoder(processor, processor.image_token_id, 512)
