"""What a stored id means to a student: every difference from the teacher is found, with an example."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, ProcessorMixin

from stages.student.data.tokenizer_compatibility import tokenizer_differences
from stages.student.data.vocabularies import other_tokenizer, refuse_other_vocabulary
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and a student's decoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    teacher = make_tiny_llava(folder / "teacher")
    return teacher, make_tiny_lm(folder / "lm", tokenizer_from=teacher)


@pytest.fixture(scope="module")
def processor(folders: tuple[Path, Path]) -> ProcessorMixin:
    loaded: ProcessorMixin = AutoProcessor.from_pretrained(folders[0])
    return loaded


def changed(folders: tuple[Path, Path], out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The student's folder with another tokenizer.json."""
    shutil.copytree(folders[1], out)
    rules = json.loads((out / "tokenizer.json").read_text())
    change(rules)
    (out / "tokenizer.json").write_text(json.dumps(rules))
    return out


def added(rules: dict[str, Any], token: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in rules["added_tokens"] if entry["content"] == token)
    return entry


def rename(rules: dict[str, Any], token: str, name: str) -> None:
    added(rules, token)["content"] = name
    rules["model"]["vocab"] = {name if t == token else t: n for t, n in rules["model"]["vocab"].items()}


def test_the_teachers_own_tokenizer_is_accepted(folders: tuple[Path, Path], processor: ProcessorMixin) -> None:
    assert tokenizer_differences(processor, folders[0]) == []
    assert tokenizer_differences(processor, folders[1]) == []


def test_swapped_vocabulary_entries_are_refused_with_an_example(
    folders: tuple[Path, Path], processor: ProcessorMixin, tmp_path: Path
) -> None:
    def swap(rules: dict[str, Any]) -> None:
        vocab = rules["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    number = processor.tokenizer.get_vocab()["a"]
    total = len(processor.tokenizer)
    folder = changed(folders, tmp_path / "lm", swap)
    (line,) = tokenizer_differences(processor, folder)
    message = str(other_tokenizer(folder, [line]))
    assert f"vocabulary entries: 2 of {total} ids differ" in message
    assert f"id {number} is 'a' to the teacher, is 'b' to the student" in message
    assert "added tokens" not in message
    assert f"the tokenizer of {folder} is not the teacher's" in message
    assert "set kd_weight to 0 in every stage that is trained (--set train.dpt.kd_weight=0" in message


@pytest.mark.parametrize(("letters", "refused"), [("ab", False), ("abc", True)])
def test_without_knowing_which_ids_are_unread_two_may_differ(
    letters: str, refused: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    def turn(rules: dict[str, Any]) -> None:
        vocab = rules["model"]["vocab"]
        vocab.update(zip(letters, [vocab[letter] for letter in letters[1:] + letters[0]], strict=True))

    other = changed(folders, tmp_path / "lm", turn)
    with pytest.raises(UserError, match=r"3 of .* ids differ") if refused else nullcontext():
        refuse_other_vocabulary(folders[0], other)


def test_another_added_token_at_an_id_is_refused_as_such(
    folders: tuple[Path, Path], processor: ProcessorMixin, tmp_path: Path
) -> None:
    eos = processor.tokenizer.eos_token
    folder = changed(folders, tmp_path / "lm", lambda rules: rename(rules, eos, "<|other|>"))
    (line,) = tokenizer_differences(processor, folder)
    assert re.match(r"added tokens: 1 of \d+ ids differ", line)


def test_the_images_placeholder_need_not_agree_for_no_student_reads_it(
    folders: tuple[Path, Path], processor: ProcessorMixin, tmp_path: Path
) -> None:
    image = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    folder = changed(folders, tmp_path / "lm", lambda rules: rename(rules, image, "<|object_ref_start|>"))
    assert tokenizer_differences(processor, folder) == []


def test_a_tokenizer_that_ends_earlier_or_has_more_tokens_is_accepted(
    folders: tuple[Path, Path], processor: ProcessorMixin, tmp_path: Path
) -> None:
    def more(rules: dict[str, Any]) -> None:
        number = 1 + max(max(rules["model"]["vocab"].values()), *(entry["id"] for entry in rules["added_tokens"]))
        rules["added_tokens"].append({**rules["added_tokens"][0], "id": number, "content": "<|new|>"})

    def fewer(rules: dict[str, Any]) -> None:
        last = max(rules["model"]["vocab"].items(), key=lambda item: item[1])[0]
        del rules["model"]["vocab"][last]
        rules["model"]["merges"] = [pair for pair in rules["model"]["merges"] if "".join(pair) != last]

    assert tokenizer_differences(processor, changed(folders, tmp_path / "more", more)) == []
    assert tokenizer_differences(processor, changed(folders, tmp_path / "fewer", fewer)) == []


def test_a_folder_without_a_tokenizer_is_refused(
    folders: tuple[Path, Path], processor: ProcessorMixin, tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "lm")
    (tmp_path / "lm/tokenizer.json").unlink()
    with pytest.raises(UserError, match="nothing says whether its token ids are the teacher's"):
        tokenizer_differences(processor, tmp_path / "lm")
