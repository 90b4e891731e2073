"""Headers of safetensors files that lie or ask for much: a named error within seconds, in little memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoints.resolve import resolve_checkpoint
from stages.checkpoints.weights import load_weights
from stages.convert.checkpoint import convert_checkpoint
from stages.student.model.build import build_student, check_vision_tower
from stages.student.model.loading import check_weights, load_multimodal, load_student
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.fuzz.attempt import limits
from tests.fuzz.safetensors_files import named_tensors, with_header
from tests.stages.convert.test_checkpoint import GOLDEN

FILE = "model.safetensors"


def one(**settings: Any) -> bytes:
    """The header of a tensor of eight bytes, or of another one."""
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **settings}}).encode()


TENSOR = bytes(8)
BOMBS: dict[str, Callable[[], bytes]] = {
    "a length of 2^63": lambda: with_header(b"", b"", 2**63),
    "a length of 2^64 - 1": lambda: with_header(one(), TENSOR, 2**64 - 1),
    "a length beyond the file": lambda: with_header(one(), TENSOR, 2**20),
    "less than a length": lambda: b"\0" * 7,
    "a header of 100 MB": lambda: with_header(one() + b" " * 10**8, TENSOR),
    "a million tensors": lambda: with_header(named_tensors(10**6), b""),
    "no tensors": lambda: with_header(b"{}", b""),
    "other JSON": lambda: with_header(b"[" * 10**6, b""),
    "offsets out of range": lambda: with_header(one(data_offsets=[0, 2**62]), TENSOR),
    "offsets that fall": lambda: with_header(one(data_offsets=[8, 0]), TENSOR),
    "a negative offset": lambda: with_header(one(data_offsets=[-8, 0]), TENSOR),
    "a shape whose product overflows": lambda: with_header(one(shape=[2**32, 2**32]), TENSOR),
    "a shape whose product overflows to the true one": lambda: with_header(one(shape=[2**63, 4, 2]), TENSOR),
    "a shape of many sizes": lambda: with_header(one(shape=[1] * 10**6), TENSOR),
    "tensors that overlap": lambda: with_header(
        json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}).encode(), TENSOR
    ),
    "a hole": lambda: with_header(one(data_offsets=[8, 16]), TENSOR * 2),
    "an unknown type": lambda: with_header(one(dtype="F1"), TENSOR),
    "a name of 1 MB": lambda: with_header(one().replace(b'"a"', b'"' + b"a" * 10**6 + b'"'), TENSOR),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_tiny_lm(folder / "lm", tokenizer_from=make_tiny_llava(folder / "llava"))
    shutil.copytree(GOLDEN, folder / "released", ignore=shutil.ignore_patterns("expected.*"))
    return folder


READERS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a checkpoint": ("llava", lambda folder, _: resolve_checkpoint(folder)),
    "a teacher": ("llava", lambda folder, _: load_teacher(TeacherConfig(checkpoint=str(folder)))),
    "a student": ("llava", lambda folder, _: load_student(folder)),
    "a model to chat with": ("llava", lambda folder, _: load_multimodal(folder)),
    "a student with eyes of its own": ("llava", lambda folder, _: check_weights(folder, bare=False)),
    "a decoder": ("lm", lambda folder, _: load_weights(AutoModelForCausalLM, folder, dtype=torch.float32)),
    "the vision tower of a store": ("llava", lambda folder, others: build_student(folder, others / "lm", 0)),
    "the vision tower to compare with": ("llava", lambda folder, others: check_vision_tower(others / "llava", folder)),
    "a released checkpoint": ("released", lambda folder, _: convert_checkpoint(folder, folder.parent / "converted")),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_lies_is_a_named_error_at_once(checkpoints: Path, bomb: str, tmp_path: Path) -> None:
    """Before a model is made of the config: the first reader stands for all others, which begin with it."""
    folder = Path(shutil.copytree(checkpoints / "lm", tmp_path / "lm"))
    (folder / FILE).write_bytes(BOMBS[bomb]())
    with limits(), pytest.raises(UserError) as caught:
        load_weights(AutoModelForCausalLM, folder, dtype=torch.float32)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_weights_refuses_a_header_that_is_too_large_before_the_library_reads_it(
    checkpoints: Path, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, read = READERS[reader]
    if reader == "the vision tower to compare with":
        monkeypatch.setattr("stages.student.model.build.VISION_PREFIXES", {"llava": "model."})
    folder = Path(shutil.copytree(checkpoints / kind, tmp_path / kind))
    (folder / FILE).write_bytes(with_header(b"{}", b"", 2**63))
    with limits(), pytest.raises(UserError, match=r"model\.safetensors says that its header has 9223372036854775808"):
        read(folder, checkpoints)


@pytest.mark.parametrize("size", [2**20, 2**31, 2**40])
def test_a_config_of_a_larger_model_than_its_weights_needs_no_memory(
    checkpoints: Path, size: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints / "lm", tmp_path / "lm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size, "hidden_size": 2**12}))
    with limits(), pytest.raises(UserError, match=r"of another shape|cannot be read by transformers"):
        load_weights(AutoModelForCausalLM, folder, dtype=torch.float32)


def test_a_vision_tower_of_other_shapes_than_its_config_asks_for_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    load_teacher(TeacherConfig(checkpoint=str(make_tiny_llava(tmp_path / "llava", patch_size=4)))).save_vision(folder)
    shutil.copy(checkpoints / "llava/config.json", folder)
    with pytest.raises(
        UserError, match=r"does not fit this student: unexpected or of another shape model\.vision_tower"
    ):
        build_student(folder, checkpoints / "lm", 0)
