"""GGUF files as decoders of students: the same tokens and logits as the checkpoint they were made of, or a refusal."""

import hashlib
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.checkpoints.gguf import MAX_HEAD_BYTES
from stages.checkpoints.processors import load_processor
from stages.checkpoints.resolve import resolve_checkpoint, resolve_student
from stages.checkpoints.weights import load_weights, weights_digest
from stages.student.data.tokenizer_compatibility import tokenizer_differences
from stages.student.model.build import build_student
from stages.student.training.resume_guard import decoder_digest, gguf_record
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.fuzz.attempt import limits
from tests.gguf_files import make_gguf

TOKENS = torch.arange(40)[None]
TEXTS = ("What is the colour? 12  345", "a red   square\n\n\tis  here 'twas it's", "Grüße 你好 🙂 é")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "gguf-cache"
    monkeypatch.setenv("CDP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("teacher") / "llava")


@pytest.fixture(scope="module")
def decoder(teacher: Path) -> Path:
    return make_tiny_lm(teacher.parent / "lm", tokenizer_from=teacher)


@pytest.fixture(scope="module")
def file(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "decoder.gguf", decoder)


@pytest.mark.parametrize("named", ["the file", "its folder", "another ending", "no ending"])
def test_it_is_the_decoder_it_was_made_of(file: Path, decoder: Path, cache: Path, named: str, tmp_path: Path) -> None:
    links = {"another ending": tmp_path / "m.GGUF", "no ending": tmp_path / "blob"}
    if named in links:
        links[named].symlink_to(file)
    folder = resolve_student(links.get(named, file.parent if named == "its folder" else file))
    assert folder.parent == cache
    found = load_weights(AutoModelForCausalLM, folder, nothing_else=True, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, decoder))
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == ("<|endoftext|>", "<|pad|>", theirs.chat_template)


def test_a_student_is_built_on_it_as_on_its_checkpoint(
    file: Path, decoder: Path, teacher: Path, tmp_path: Path
) -> None:
    load_teacher(TeacherConfig(checkpoint=str(teacher))).save_vision(tmp_path / "vision")
    assert tokenizer_differences(load_processor(teacher), resolve_student(file)) == []
    student, expected = (build_student(tmp_path / "vision", place, 0).state_dict() for place in (file, decoder))
    assert student.keys() == expected.keys()
    # Drawn as wide as a config says, which a GGUF file does not.
    del expected["model.post_connector.weight"]
    assert all(torch.equal(student[name], tensor) for name, tensor in expected.items())


def test_what_lies_beside_it_is_neither_read_nor_kept(
    file: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(file, tmp_path / "decoder.gguf")
    tokenizer = json.loads((decoder / "tokenizer.json").read_text())
    word = {"content": "colour", "id": 5, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({**word, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    # The library would ask the hub for the model that an adapter names.
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model", "peft_type": "LORA"}')
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    folder = resolve_student(tmp_path / "decoder.gguf")
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, decoder))
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert resolve_student(file) == folder


def test_a_run_records_which_file_it_was(file: Path, decoder: Path) -> None:
    assert gguf_record(str(file)) == {"decoder_gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert gguf_record(str(file.parent)) == gguf_record(str(file))
    assert gguf_record(str(decoder)) == {}
    assert decoder_digest(str(file)) == weights_digest(resolve_student(file))


def test_it_is_converted_once_and_the_log_says_so(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path))
    first = resolve_student(file)
    begun, ended = caplog.messages
    assert begun.startswith(f"{file}: its ")
    assert begun.endswith(" weights become a checkpoint, once; this may take minutes")
    assert ended.endswith(f" s, kept in {tmp_path}")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert resolve_student(file) == first
    assert caplog.messages == [begun, ended]


def test_digits_stand_alone_where_the_file_says_so(decoder: Path, tmp_path: Path) -> None:
    apart = resolve_student(make_gguf(tmp_path / "a.gguf", decoder, split="smollm"))
    backend = Tokenizer.from_file(str(apart / "tokenizer.json"))
    pieces = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("x  12 it's")]
    # The two spaces are one piece: GPT-2's rule alone gives the second one to the digit.
    assert pieces == ["x", "ĠĠ", "1", "2", "Ġit", "'s"]


def llama_3_factors(num: int, factor: float, theta: float = 10_000.0) -> torch.Tensor:
    """What llama.cpp's converter divides the frequencies by, one at a time."""
    found = []
    for n in range(num):
        wavelength = 2 * math.pi * theta ** (n / num)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / factor + smooth) if wavelength <= 8192 else factor
        found.append(1.0 if wavelength < 8192 / 4 else middle)
    return torch.tensor(found)


def test_rotation_scaled_as_in_llama_3_is_kept_and_another_is_refused(teacher: Path, tmp_path: Path) -> None:
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=teacher, hidden=64, heads=2)
    factors = llama_3_factors(16, 8.0)
    assert 1.0 < factors[-4] < 8.0 == factors[-1]
    folder = resolve_student(make_gguf(tmp_path / "a.gguf", decoder, rotation=factors))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert found.config.rope_parameters["rope_type"] == "llama3"
    plain = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq * factors, plain.model.rotary_emb.inv_freq)
    with torch.no_grad():
        assert not torch.allclose(found(TOKENS).logits, plain(TOKENS).logits)
        plain.model.rotary_emb.inv_freq /= factors
        torch.testing.assert_close(found(TOKENS).logits, plain(TOKENS).logits)
    assert "scaled in a way that is not known here" in refusal(
        make_gguf(tmp_path / "b.gguf", decoder, rotation=factors.flip(0))
    )


@pytest.mark.parametrize(("split", "whole"), [("llama-bpe", True), ("qwen2", False)])
def test_words_that_are_tokens_are_not_merged_where_the_reference_does_not(
    decoder: Path, tmp_path: Path, split: str, whole: bool
) -> None:
    folder = resolve_student(make_gguf(tmp_path / "a.gguf", decoder, split=split))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).model.ignore_merges == whole


def refusal(file: Path) -> str:
    with limits(), pytest.raises(UserError) as caught:
        resolve_student(file)
    return str(caught.value)


def test_what_the_library_would_leave_out_is_refused(decoder: Path, tmp_path: Path) -> None:
    assert "splits text as 'deepseek-llm'" in refusal(make_gguf(tmp_path / "a.gguf", decoder, split="deepseek-llm"))
    assert "missing: model.norm.weight" in refusal(
        make_gguf(tmp_path / "b.gguf", decoder, misnamed="output_norm.weight")
    )
    assert "one of 3 parts" in refusal(make_gguf(tmp_path / "c.gguf", decoder, split__count=3))


def test_what_it_describes_beyond_its_tensors_is_refused_before_memory_is_taken(decoder: Path, tmp_path: Path) -> None:
    wide = make_gguf(tmp_path / "a.gguf", decoder, qwen2__feed_forward_length=2**31)
    assert "weights and holds" in refusal(wide)
    assert "block_count 5000, at most 4096" in refusal(make_gguf(tmp_path / "b.gguf", decoder, qwen2__block_count=5000))


def test_several_files_of_a_folder_are_not_chosen_from(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    assert "holds 2 GGUF files (a.gguf, b.gguf); name one of them" in refusal(tmp_path)


def test_safetensors_in_the_same_folder_go_first(file: Path, decoder: Path, tmp_path: Path) -> None:
    for path in (file, *decoder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert resolve_student(tmp_path) == resolve_checkpoint(tmp_path) == tmp_path


def test_it_is_no_teacher(file: Path) -> None:
    for name in (file, file.parent):
        with pytest.raises(UserError, match="read as a student's decoder and as nothing else"):
            load_teacher(TeacherConfig(checkpoint=str(name)))


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'compodistill[gguf]'" in refusal(file)


def head(*, tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(words: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(words) if length is None else length) + words


def tensor(*shape: int, kind: int = 0, offset: int = 0, name: bytes = b"a") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BOMBS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "another file": lambda: b"PK\3\4" + bytes(100),
    "a pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "an old version": lambda: head(version=1),
    "2^60 settings": lambda: head(fields=2**60),
    "2^60 tensors": lambda: head(tensors=2**60),
    "a name of 2^63 bytes": lambda: head(fields=1) + text(b"a", 2**63),
    "a list of 2^60 numbers": lambda: head(fields=1) + text(b"a") + struct.pack("<IIQ", 9, 0, 2**60),
    "two million texts": lambda: head(fields=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**22) + bytes(2**25),
    "a long list of no vocabulary": lambda: (
        head(fields=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**13) + bytes(2**16)
    ),
    "lists in a list": lambda: head(fields=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 10) * 10,
    "an unknown kind": lambda: head(fields=1) + text(b"a") + struct.pack("<I", 99),
    "the same setting twice": lambda: head(fields=2) + (text(b"a") + struct.pack("<IB", 0, 0)) * 2,
    "layers without end": lambda: head(fields=1) + text(b"llama.block_count") + struct.pack("<IQ", 10, 2**62),
    "layers as a text": lambda: head(fields=1) + text(b"llama.block_count") + struct.pack("<I", 8) + text(b"many"),
    "no alignment": lambda: head(fields=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
    "a huge tensor": lambda: head(tensors=1) + tensor(2**62, 2**62),
    "a tensor beyond the file": lambda: head(tensors=1) + tensor(8, offset=2**62) + bytes(100),
    "the same bytes many times": lambda: (
        head(tensors=9) + b"".join(tensor(64, name=b"%d" % n) for n in range(9)) + bytes(2**9)
    ),
    "a tensor without dimensions": lambda: head(tensors=1) + tensor() + bytes(100),
    "many dimensions": lambda: head(tensors=1) + tensor(*[1] * 100) + bytes(100),
    "a tensor of no known kind": lambda: head(tensors=1) + tensor(8, kind=77) + bytes(100),
    "half a block": lambda: head(tensors=1) + tensor(7, kind=2) + bytes(100),
    "no architecture": lambda: head(),
    "a head of 100 MB": lambda: head(fields=1) + text(b"a") + struct.pack("<I", 8) + text(bytes(MAX_HEAD_BYTES)),
}


TOO_SHORT = ("a huge tensor", "a tensor beyond the file", "the same bytes many times")


@pytest.mark.parametrize("case", BOMBS)
def test_a_head_that_lies_is_refused_in_little_time_and_memory(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.gguf").write_bytes(BOMBS[case]())
    said = refusal(tmp_path / "a.gguf")
    assert "a.gguf" in said
    assert ("fewer than its tensors take" in said) == (case in TOO_SHORT)


def test_nothing_of_a_refused_file_stays_in_the_cache(decoder: Path, tmp_path: Path, cache: Path) -> None:
    before = {path.name for path in cache.glob("*") if path.is_dir()}
    refusal(make_gguf(tmp_path / "b.gguf", decoder, misnamed="blk.0.attn_q.weight"))
    assert {path.name for path in cache.glob("*") if path.is_dir()} == before


def test_the_converted_folder_names_neither_machine_nor_loader(file: Path) -> None:
    folder = resolve_student(file)
    saved = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "tokenizer.json"]
    assert not {"_model_name_or_path", "quantization_config", "local_files_only", "auto_map"} & set().union(*saved)
