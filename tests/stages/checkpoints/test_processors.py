"""A checkpoint without a whole processor is refused with its folder and what is expected of it."""

from pathlib import Path

import pytest

from pipeline.demo.assets import STUDENT_LM
from stages.checkpoints.processors import load_processor, load_tokenizer
from stages.student.data.tokenizer_compatibility import tokenizer_differences
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make_tiny_llava(tmp_path / "llava")


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_processor(folder)
    found = str(caught.value)
    assert found.startswith(str(folder))
    assert "fetch or save them again" in found
    return found


def test_without_processor_files_it_is_refused(llava: Path) -> None:
    remove(llava, "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    assert "has no processor that can be read" in refusal(llava)


def test_a_tokenizer_alone_is_no_processor(llava: Path) -> None:
    remove(llava, "processor_config.json")
    assert "processor_config.json" in refusal(llava)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_is_refused(llava: Path, name: str, content: str) -> None:
    (llava / name).write_text(content)
    refusal(llava)


def test_a_damaged_tokenizer_is_refused_where_only_that_is_read(llava: Path) -> None:
    processor = load_processor(llava)
    (llava / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        load_tokenizer(llava)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a fast tokenizer"):
        tokenizer_differences(processor, llava)


def test_a_word_list_beside_a_qwen2_is_read_as_it_is_written() -> None:
    # transformers takes its Qwen2Tokenizer there, which is a BPE.
    tokenizer = load_tokenizer(STUDENT_LM)
    ids = tokenizer("a red circle", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "a red circle"
    assert tokenizer.unk_token_id in tokenizer("Yes", add_special_tokens=False).input_ids
