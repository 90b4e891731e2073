"""What a checkpoint's files name beside its own weights is refused by every reader before anything is loaded."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.checkpoints.configs import check_configs, load_config
from stages.checkpoints.processors import load_processor, load_tokenizer
from stages.checkpoints.resolve import resolve_checkpoint
from stages.checkpoints.weight_files import weight_files
from stages.checkpoints.weights import weights_digest
from stages.convert.checkpoint import convert_checkpoint
from stages.student.model.build import build_student
from stages.student.model.loading import check_weights, load_multimodal, load_student
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm


class RanCode(Exception):
    """Raised where a pickle is loaded."""


class Harm:
    """Pickles to a call that raises `RanCode`."""

    def __reduce__(self) -> Any:
        return exec, ("from tests.stages.checkpoints.test_hostile_checkpoints import RanCode; raise RanCode",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.fixture(scope="module")
def decoder(teacher: Path) -> Path:
    return make_tiny_lm(teacher.parent / "lm", tokenizer_from=teacher)


@pytest.fixture
def llava(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "llava"))


def put(file: Path, fields: Mapping[str, Any]) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | fields))


def as_teacher(folder: Path) -> object:
    return identify_teacher(TeacherConfig(checkpoint=str(folder)), on_gpu=False)


READERS: dict[str, Callable[[Path], object]] = {
    "teacher, identified": as_teacher,
    "teacher": lambda folder: load_teacher(TeacherConfig(checkpoint=str(folder))),
    "student": load_student,
    "evaluated": load_multimodal,
    "with a vision tower of its own": lambda folder: check_weights(folder, bare=False),
}


def decoy(folder: Path) -> None:
    """Pickled weights with a safetensors file beside them that nobody would load."""
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    torch.save(Harm(), folder / "pytorch_model.bin")


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a decoy beside pickled weights": (decoy, "has neither model.safetensors nor"),
    "an adapter": (lambda f: put(f / "adapter_config.json", {"peft_type": "LORA"}), "asks for a PEFT adapter"),
    "weights by another name": (
        lambda f: put(f / "config.json", {"transformers_weights": "decoy.safetensors"}),
        "transformers_weights: decoy",
    ),
    "an index that leaves the folder": (
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "outside.safetensors"),
            put(f / "model.safetensors.index.json", {"weight_map": {"a": "../outside.safetensors"}}),
        ),
        "which the folder does not hold",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_the_digested_ones_are_refused(llava: Path, case: str, reader: str) -> None:
    spoil, expected = WEIGHTS[case]
    spoil(llava)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        READERS[reader](llava)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_decoder_is_refused_likewise(teacher: Path, decoder: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(decoder, tmp_path / "lm"))
    spoil, expected = WEIGHTS[case]
    spoil(folder)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        build_student(teacher, str(folder), 0)


def test_the_digest_is_of_what_is_loaded_and_of_nothing_else(llava: Path) -> None:
    before = weights_digest(llava)
    (llava / "consolidated.safetensors").write_bytes((llava / "model.safetensors").read_bytes()[:-1])
    (llava / "pytorch_model.bin").write_bytes(b"pickled")
    assert [file.name for file in weight_files(llava)] == ["model.safetensors"]
    assert weights_digest(llava) == before
    assert as_teacher(llava)
    load_teacher(TeacherConfig(checkpoint=str(llava)))
    with (llava / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert weights_digest(llava) != before


NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "code of a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["harm.Harm", None]}}),
    "code of a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "harm.Harm"}}),
    "code of an image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "harm.Harm"}}),
    "code in a nested config": ("processor_config.json", {"image_processor": {"auto_map": {"A": "harm.Harm"}}}),
    "a pickled model": (
        "processor_config.json",
        {"audio_tokenizer": {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "/harm"}},
    ),
    "a pickled model in a file of its own": ("audio_tokenizer_config.json", {"audio_tokenizer_class": "DacModel"}),
    "a tokenizer of another name": ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.5.0.0.json"]}),
    "arguments in order": ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
}
OF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "code of an unknown model": ("config.json", {"model_type": "harm", "auto_map": {"AutoConfig": "harm.Harm"}}),
    "a config of another name": ("config.json", {"configuration_files": ["/tmp/config.5.0.0.json"]}),
    "attention of another repository": ("config.json", {"text_config": {"_attn_implementation": "owner/kernel"}}),
    "experts of another repository": ("config.json", {"experts_implementation": "owner/kernel"}),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("reader", [load_processor, load_tokenizer, as_teacher, check_configs])
def test_a_processor_that_names_code_or_other_files_is_refused(
    llava: Path, case: str, reader: Callable[[Path], object]
) -> None:
    name, fields = NAMES[case]
    (llava / "harm.py").write_text("raise SystemExit('it ran')")
    put(llava / name, fields)
    with pytest.raises(UserError, match="which is refused"):
        reader(llava)


@pytest.mark.parametrize("case", OF_MODELS)
@pytest.mark.parametrize("reader", [load_config, *READERS.values()])
def test_a_model_that_names_code_or_other_repositories_is_refused(
    llava: Path, case: str, reader: Callable[[Path], object]
) -> None:
    name, fields = OF_MODELS[case]
    (llava / "harm.py").write_text("raise SystemExit('it ran')")
    put(llava / name, fields)
    with pytest.raises(UserError, match="which is refused"):
        reader(llava)


def test_a_model_type_of_the_library_is_loaded_by_its_class_whatever_auto_map_names(llava: Path) -> None:
    (llava / "harm.py").write_text("raise SystemExit('it ran')")
    put(llava / "config.json", {"auto_map": {"AutoModelForImageTextToText": "harm.Harm"}})
    assert type(load_multimodal(resolve_checkpoint(llava))).__module__.startswith("transformers.")


def test_a_conversion_reads_no_tokenizer_that_only_the_config_names(
    released: Path, teacher: Path, tmp_path: Path
) -> None:
    put(released / "config.json", {"tokenizer_name_or_path": str(teacher), "auto_map": {"AutoConfig": "harm.Harm"}})
    report = convert_checkpoint(released, tmp_path / "out")
    assert (report.tokenizer_from, report.tokenizer_named) == (None, str(teacher))
    put(released / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["harm.Harm", None]}})
    shutil.copy(teacher / "tokenizer.json", released)
    with pytest.raises(UserError, match="which is refused"):
        convert_checkpoint(released, tmp_path / "again")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The golden checkpoint of a released layout, without a tokenizer."""
    golden = Path(__file__).parents[2] / "golden" / "released_layout_teacher"
    return Path(shutil.copytree(golden, tmp_path / "released"))
