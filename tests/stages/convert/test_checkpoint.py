"""A converted checkpoint computes what the released one does, or nothing is written.

`tests/golden/released_layout_teacher` is a tiny random checkpoint in the released layout with its expected outputs.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from typer.testing import CliRunner

from pipeline.cli.app import app
from stages.attention.capture import AttentionCapture, enable_capture
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.convert.checkpoint import ConversionReport, convert_checkpoint
from stages.student.model.loading import load_student
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import draw_random_image

GOLDEN = Path(__file__).parents[2] / "golden" / "released_layout_teacher"
WORDS = ["USER:", "ASSISTANT:", "What", "is", "it?", "A", "red", "square.", "two", "squares."]


def make_tokenizer(folder: Path, size: int) -> str:
    """Whole words, `size` of them with the end token last."""
    words = [*WORDS, *(f"word{number}" for number in range(size - len(WORDS) - 1)), "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[9]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The golden checkpoint with a tokenizer that leaves one row of the vocabulary free, and an image processor."""
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("expected.*"))
    make_tokenizer(folder, 198)
    SiglipImageProcessorPil(size={"height": 70, "width": 70}).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def expanded(input_ids: Tensor, image_token_id: int, num_image_tokens: int) -> Tensor:
    """The released ids, -200 replaced by one token a feature."""
    parts = [
        torch.full((num_image_tokens,), image_token_id) if token == -200 else torch.tensor([token])
        for token in input_ids.tolist()
    ]
    return torch.cat(parts)[None]


def assert_golden(folder: Path) -> None:
    """In float64, since float32 alone is 2e-4 off at logits of 8; there to a ten-thousandth of the largest."""
    golden = load_file(GOLDEN / "expected.safetensors")
    for dtype in (torch.float32, torch.float64):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        enable_capture(model)
        ids = expanded(golden["input_ids"][0], model.config.image_token_id, 24)
        positions = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
        capture = AttentionCapture(layers=frozenset(range(12)), positions=[positions])
        pixels = golden["pixel_values"].to(dtype)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels).pooler_output
            logits = model(input_ids=ids, pixel_values=pixels, capture=capture).logits
        found = {
            "image_features": torch.stack(list(features)),
            "logits": logits[..., :199],
            "attention": torch.stack([capture.maps[layer][0] for layer in range(12)]),
        }
        for name, tensor in found.items():
            scale = float(golden[name].abs().max()) if dtype == torch.float32 else 1.0
            torch.testing.assert_close(tensor.float(), golden[name], atol=1e-4 * scale, rtol=0, msg=name)


def load(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_converted_teacher_has_the_released_features_logits_and_maps(released: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(released, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "llava"
    assert_golden(tmp_path / "out")
    assert (report.added_rows, report.image_token_id) == (0, 198)
    assert report == ConversionReport.model_validate_json((tmp_path / "out" / "conversion.json").read_text())
    assert not list(tmp_path.glob("*.partial"))


def test_a_vocabulary_without_a_free_id_grows_by_a_row_and_the_other_logits_stay(
    released: Path, tmp_path: Path
) -> None:
    words = make_tokenizer(tmp_path / "words", 199)
    report = convert_checkpoint(released, tmp_path / "out", tokenizer=words)
    assert (report.added_rows, report.image_token_id) == (1, 199)
    assert load(tmp_path / "out").get_output_embeddings().weight.shape[0] == 200
    assert_golden(tmp_path / "out")


def test_names_of_older_libraries_and_several_files_convert_to_the_same_weights(released: Path, tmp_path: Path) -> None:
    convert_checkpoint(released, tmp_path / "one")
    tensors = load_file(released / "model.safetensors")
    (released / "model.safetensors").unlink()
    older = {
        name.replace("_vision_tower.", "_vision_tower.vision_model.", 1) if "_vision_tower." in name else name: tensor
        for name, tensor in tensors.items()
    }
    older = {name.replace("vision_tower._vision_model", "vision_tower._vision_tower"): t for name, t in older.items()}
    older["vision_tower._vision_tower.vision_model.embeddings.position_ids"] = torch.arange(25)[None]
    older["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    names = sorted(older)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:50], names[50:])):
        save_file({name: older[name] for name in part}, released / f"model-0000{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{number}.safetensors")
    (released / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit(released, model_type="tinyllava")
    convert_checkpoint(released, tmp_path / "two")
    first, second = load(tmp_path / "one").state_dict(), load(tmp_path / "two").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (tmp_path / "two" / "model.safetensors.index.json").is_file()


def test_a_student_with_a_post_connector_becomes_this_projects_student(released: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = {
        "_connector.0": torch.randn(40, 32, generator=generator) / 6,
        "_connector.2": torch.randn(40, 40, generator=generator) / 6,
        "post_connector": torch.randn(48, 40, generator=generator) / 6,
    }

    def change(tensors: dict[str, Tensor]) -> None:
        for name, weight in mlp.items():
            tensors[f"connector.{name}.weight"] = weight
            tensors[f"connector.{name}.bias"] = torch.full((weight.shape[0],), 0.25)

    edit_weights(released, change)
    edit(released, post_connector_use=True, connector_hidden_size=40)
    report = convert_checkpoint(released, tmp_path / "out")
    assert report.model_type == "compodistill_student"
    student = load_student(tmp_path / "out")
    pixels = load_file(GOLDEN / "expected.safetensors")["pixel_values"]
    with torch.no_grad():
        states = student.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = F.linear(F.gelu(F.linear(states, mlp["_connector.0"], torch.full((40,), 0.25))), mlp["_connector.2"])
        expected = F.linear(hidden + 0.25, mlp["post_connector"], torch.full((48,), 0.25))
        found = student.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), expected, atol=1e-5, rtol=1e-5)


def test_the_processor_writes_the_published_conversation_format(released: Path, tmp_path: Path) -> None:
    convert_checkpoint(released, tmp_path / "out")
    processor = load_processor(tmp_path / "out")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
        {"role": "user", "content": [{"type": "text", "text": "two?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    assert processor.apply_chat_template(messages, tokenize=False) == (
        f"{system}USER: <image>\nWhat is it? ASSISTANT: A red square.<|endoftext|>USER: two? ASSISTANT: A<|endoftext|>"
    )
    prompt = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{system}USER: <image>\nWhat is it? ASSISTANT:"


def test_a_converted_checkpoint_is_a_teacher_and_marks_its_answers(released: Path, tmp_path: Path) -> None:
    convert_checkpoint(released, tmp_path / "out")
    teacher = load_teacher(TeacherConfig(checkpoint=str(tmp_path / "out")))
    assert isinstance(teacher.encoder, ConversationEncoder)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}]
    encoded = teacher.encoder.encode(turns, [draw_random_image(random.Random(0))])
    assert len(encoded.image_positions) == 24
    answer = teacher.encoder.processor.tokenizer.convert_ids_to_tokens(encoded.token_ids[encoded.answer_mask])
    assert answer == ["A", "red", "square.", "<|endoftext|>"]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another model type": (lambda f: edit(f, model_type="llava_mistral"), "'llava_mistral'; the layouts known"),
    "another connector": (lambda f: edit(f, connector_type="resampler"), "connector_type 'resampler'.*mlp2x_gelu"),
    "tiles": (lambda f: edit(f, image_aspect_ratio="anyres"), "image_aspect_ratio 'anyres'.*'square'"),
    "another tower": (lambda f: edit(f, vision_config={"model_type": "dinov2"}), "vision_config is of type 'dinov2'"),
    "no decoder config": (lambda f: edit(f, text_config={}), "has no text_config with a model_type"),
    "a missing tensor": (
        lambda f: edit_weights(f, lambda t: t.__delitem__("connector._connector.2.bias")),
        r"missing model.multi_modal_projector.linear_2.bias, unexpected none",
    ),
    "an unexpected tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"language_model.lm_head.bias": torch.zeros(199)})),
        r"missing none, unexpected language_model.lm_head.bias",
    ),
    "a foreign tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"model.mm_projector.0.bias": torch.zeros(4)})),
        r"'model.mm_projector.0.bias' is not of the released layout",
    ),
    "another shape": (
        lambda f: edit_weights(f, lambda t: t.update({"connector._connector.0.bias": torch.zeros(7)})),
        r"'connector._connector.0.bias' of model.safetensors has shape \[7\], the config asks for \[48\]",
    ),
    "images of another size": (
        lambda f: SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(f),
        "makes images of 64 pixels, the tower takes 70",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_converted_is_refused_by_name_and_nothing_is_written(
    name: str, released: Path, tmp_path: Path
) -> None:
    change, message = BROKEN[name]
    change(released)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        convert_checkpoint(released, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_pickled_weights_are_refused_with_the_way_to_safe_ones(released: Path, tmp_path: Path) -> None:
    (released / "model.safetensors").rename(released / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"never loaded.*safe_serialization=True"):
        convert_checkpoint(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_nothing(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("stages.convert.checkpoint.save_file", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(released, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_holds_something_is_left_alone(released: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        convert_checkpoint(released, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_any_tokenizer_the_model_is_converted_and_the_report_says_so(tmp_path: Path) -> None:
    report = convert_checkpoint(GOLDEN, tmp_path / "out")
    assert (report.tokenizer_from, report.image_processor_from) == (None, "the vision tower's config")
    assert (report.image_token_id, report.added_rows) == (199, 1)
    assert not (tmp_path / "out" / "processor_config.json").exists()
    assert_golden(tmp_path / "out")
    result = CliRunner().invoke(app, ["convert-checkpoint", str(GOLDEN), str(tmp_path / "again")], terminal_width=200)
    assert "none found, so no processor was written" in " ".join(result.output.split())


def test_a_named_tokenizer_or_image_processor_that_is_not_there_is_refused(released: Path, tmp_path: Path) -> None:
    for settings in ({"tokenizer": str(tmp_path / "none")}, {"image_processor": str(tmp_path / "none")}):
        with pytest.raises(UserError, match="name a folder or hub id with --"):
            convert_checkpoint(released, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_lost_file_is_refused(released: Path, tmp_path: Path) -> None:
    (released / "model.safetensors").rename(released / "model-00001.safetensors")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (released / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names model-00002\.safetensors, which the folder does not hold"):
        convert_checkpoint(released, tmp_path / "out")


def test_the_command_converts_and_prints_what_it_did(released: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert-checkpoint", str(released), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert_golden(tmp_path / "out")
