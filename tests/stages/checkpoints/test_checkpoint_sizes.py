"""Sizes and counts in a checkpoint's configs are refused by name before memory is taken for what they ask for."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stages.checkpoints.config_files import read_config
from stages.checkpoints.processor_sizes import check_picture
from stages.checkpoints.processors import load_processor
from stages.convert.checkpoint import convert_checkpoint
from stages.student.model.build import build_student, check_decoder
from stages.student.model.loading import check_weights, load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.teacher import load_teacher
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.tiny_families import make_tiny_family

HUGE = 2**60
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
GOLDEN = Path(__file__).parents[2] / "golden" / "released_layout_teacher"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        path = folder / family
        if not path.exists():
            if family == "lm":
                make_tiny_lm(path, tokenizer_from=make("llava"))
            else:
                make_tiny_llava(path) if family == "llava" else make_tiny_family(path, family)
        return path

    return make


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Takes no more than 3 GB on top of what the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def spoiled(source: Path, to: Path, file: str, dotted: str, value: Any) -> Path:
    """A copy with another value in one of its JSON files."""
    folder = Path(shutil.copytree(source, to))
    fields = json.loads((folder / file).read_text())
    *sections, name = dotted.split(".")
    inner = fields
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    (folder / file).write_text(json.dumps(fields))
    return folder


IMAGES = "image_processor"
PROCESSORS: list[tuple[str, str, Any]] = [
    *[("llava", "patch_size", value) for value in (10**6, HUGE, -1, 0, None, "x", 1e300)],
    *[("llava", "num_additional_image_tokens", value) for value in (10**6, HUGE, -1, None, "x")],
    *[("llava", f"{IMAGES}.size.height", value) for value in (10**6, HUGE, -1, 0, "x", 8.5)],
    ("llava", f"{IMAGES}.size", {"shortest_edge": 10**5}),
    ("llava", f"{IMAGES}.image_std", [0, 0, 0]),
    ("llava", f"{IMAGES}.rescale_factor", "x"),
    *[("llava_next", f"{IMAGES}.image_grid_pinpoints", [[value, value]]) for value in (10**6, 0, None, "x")],
    ("llava_next", f"{IMAGES}.image_grid_pinpoints", [[32, 32]] * 10**5),
    ("llava_next", f"{IMAGES}.crop_size.height", 10**6),
    *[("llava_onevision", "num_image_tokens", value) for value in (10**6, HUGE, 0)],
    *[("qwen2_vl", f"{IMAGES}.{name}", 10**6) for name in ("patch_size", "merge_size", "temporal_patch_size")],
    *[("qwen2_5_vl", f"{IMAGES}.{name}", 0) for name in ("patch_size", "merge_size", "temporal_patch_size")],
    ("qwen3_vl", f"{IMAGES}.size", {"shortest_edge": 2**60, "longest_edge": 2**60}),
    ("qwen2_vl", f"{IMAGES}.max_pixels", 2**60),
    ("qwen2_vl", f"{IMAGES}.min_pixels", 2**60),
    ("idefics3", f"{IMAGES}.size.longest_edge", 10**6),
    ("idefics3", f"{IMAGES}.max_image_size.longest_edge", 10**6),
    ("smolvlm", "image_seq_len", 10**6),
    ("internvl", f"{IMAGES}.max_patches", 10**6),
    ("internvl", "image_seq_length", HUGE),
    ("gemma3", "image_seq_length", 10**6),
    ("glm4v", f"{IMAGES}.merge_size", 10**6),
    *[("gemma4", f"{IMAGES}.{name}", 10**6) for name in ("patch_size", "pooling_kernel_size")],
    ("ovis2", f"{IMAGES}.max_patches", 10**6),
    ("ovis2", "image_seq_length", 10**6),
]


@pytest.mark.parametrize(("family", "setting", "value"), PROCESSORS)
@pytest.mark.usefixtures("bounded_memory")
def test_a_processor_whose_pictures_have_no_possible_size_is_refused(
    made: Callable[[str], Path], tmp_path: Path, family: str, setting: str, value: Any
) -> None:
    folder = spoiled(made(family), tmp_path / "spoiled", "processor_config.json", setting, value)
    with pytest.raises(UserError, match="settings that cannot be used"):
        load_processor(folder)


def test_a_narrow_picture_that_becomes_a_wide_one_is_refused_before_it_is_made() -> None:
    processor = SimpleNamespace(image_processor=CLIPImageProcessorPil())
    check_picture(processor, Image.new("RGB", (640, 480)))
    with pytest.raises(UnusableSample, match="image_too_large: 65000x1 pixels become"):
        check_picture(processor, Image.new("RGB", (65_000, 1)))


def test_the_image_processor_of_a_released_checkpoint_is_checked_too(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "released"))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": {"height": HUGE, "width": HUGE}})
    )
    with pytest.raises(UserError, match="settings that cannot be used: height is"):
        convert_checkpoint(folder, tmp_path / "out")


MODELS: list[tuple[str, Any]] = [
    *[("text_config.hidden_size", value) for value in (2**40, 10**6, -1, 0)],
    *[("text_config.vocab_size", value) for value in (2**40, 10**9, -1, 0)],
    *[("text_config.num_hidden_layers", value) for value in (10**9, -1)],
    *[("text_config.num_attention_heads", value) for value in (2**40, -1, 0)],
    ("text_config.num_key_value_heads", 0),
    ("text_config.intermediate_size", 2**40),
    ("vision_config.hidden_size", 10**6),
    ("vision_config.num_hidden_layers", 10**9),
    ("vision_config.image_size", 10**9),
    *[("vision_config.patch_size", value) for value in (0, "x")],
]


@pytest.mark.parametrize(("setting", "value"), MODELS)
@pytest.mark.usefixtures("bounded_memory")
def test_a_model_of_sizes_that_its_files_do_not_hold_is_refused(
    made: Callable[[str], Path], tmp_path: Path, setting: str, value: Any
) -> None:
    folder = spoiled(made("llava"), tmp_path / "spoiled", "config.json", setting, value)
    if "layers" in setting:  # otherwise the library compares the two
        folder = spoiled(folder, tmp_path / "again", "config.json", "text_config.layer_types", None)
    for load in (load_multimodal, lambda folder: check_weights(folder, bare=False), as_teacher):
        with pytest.raises(UserError, match=r"config\.json|cannot be read by transformers"):
            load(folder)


def as_teacher(folder: Path) -> object:
    return load_teacher(TeacherConfig(checkpoint=str(folder)))


def test_a_decoder_is_refused_likewise(made: Callable[[str], Path], tmp_path: Path) -> None:
    for name, value in {"hidden_size": 2**40, "num_attention_heads": 0, "num_hidden_layers": 10**9}.items():
        folder = spoiled(made("lm"), tmp_path / name, "config.json", name, value)
        with pytest.raises(UserError, match=r"config\.json|cannot be read by transformers"):
            build_student(made("llava"), str(folder), 0)


def test_a_decoder_is_refused_by_its_config_alone(made: Callable[[str], Path]) -> None:
    config = PreTrainedConfig.from_pretrained(made("lm"))
    kind = type(identify_teacher(TeacherConfig(checkpoint=str(made("llava"))), on_gpu=False).config.text_config)
    with pytest.raises(UserError, match="lm cannot be read by transformers"):
        check_decoder(Path("lm"), kind(**{**config.to_dict(), "num_attention_heads": 0}))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("vision_config.hidden_size", 10**6),
        ("text_config.hidden_size", 10**6),
        ("text_config.head_dim", 2**30),
        ("vision_config.patch_size", 0),
    ],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.usefixtures("bounded_memory")
def test_the_teacher_folder_of_a_store_is_refused_likewise(
    made: Callable[[str], Path], tmp_path: Path, family: str, setting: str, value: Any
) -> None:
    load_teacher(TeacherConfig(checkpoint=str(made(family)))).save_vision(tmp_path / "teacher")
    folder = spoiled(tmp_path / "teacher", tmp_path / "spoiled", "config.json", setting, value)
    if setting == "text_config.head_dim":
        build_student(folder, str(made("lm")), 0)  # the teacher's decoder is not built
        return
    with pytest.raises(UserError, match=r"does not fit this student|cannot be read by transformers"):
        build_student(folder, str(made("lm")), 0)


def test_sizes_of_one_layer_are_no_numbers_of_layers(tmp_path: Path) -> None:
    fields = {"text_config": {"vocab_size_per_layer_input": 262144, "num_hidden_layers": 30}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path / "config.json") == fields
