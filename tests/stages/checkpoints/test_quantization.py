"""Quantized checkpoints: as teachers they compute with what their scheme stands for; as students they are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration

from stages.checkpoints.configs import load_config
from stages.checkpoints.quantization import check_sizes
from stages.checkpoints.quantization_scheme import scheme_of
from stages.checkpoints.resolve import resolve_student
from stages.checkpoints.weights import load_weights
from stages.export.export import export_student
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.model.build import build_student
from stages.student.model.loading import load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.fuzz.attempt import limits
from tests.quantized import INT4, make_fp8, make_packed_int4, write
from tests.stages.distilled import TinyData, extract_here, make_tiny_data

Meant = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("dense") / "llava")


@pytest.fixture(scope="module")
def fp8(llava: Path) -> tuple[Path, Meant]:
    folder = llava.parent / "fp8"
    return folder, make_fp8(folder, llava)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(10, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def dense(llava: Path, to: Path, meant: Meant) -> LlavaForConditionalGeneration:
    shutil.copytree(llava, to)
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, to / "model.safetensors", {"format": "pt"})
    return LlavaForConditionalGeneration.from_pretrained(to, dtype=torch.float32).eval()


def teacher_of(folder: Path) -> Teacher:
    return load_teacher(TeacherConfig(checkpoint=str(folder), dtype="float32"))


MAKERS: dict[str, tuple[Callable[[Path, Path], Meant], str | None, str]] = {
    "FP8": (make_fp8, None, "fp8 (e4m3)"),
    "packed integers": (make_packed_int4, "compressed_tensors", "compressed-tensors (pack-quantized)"),
}


@pytest.mark.parametrize("scheme", MAKERS)
def test_a_teacher_computes_with_the_values_that_its_scheme_stands_for(
    llava: Path, tmp_path: Path, scheme: str
) -> None:
    make, package, name = MAKERS[scheme]
    if package is not None:
        pytest.importorskip(package)
    meant = make(tmp_path / "quantized", llava)
    teacher = teacher_of(tmp_path / "quantized")
    torch.testing.assert_close(logits(teacher.model), logits(dense(llava, tmp_path / "meant", meant)))
    assert scheme_of(teacher.identity.config) == name
    assert scheme_of(teacher.identity.manifest("samples", 1).fingerprint.teacher_config) == name


@pytest.mark.parametrize("scheme", MAKERS)
def test_a_quantized_teacher_is_placed_as_a_device_map_says(llava: Path, tmp_path: Path, scheme: str) -> None:
    make, package, _ = MAKERS[scheme]
    if package is not None:
        pytest.importorskip(package)
    make(tmp_path / "quantized", llava)
    settings = TeacherConfig(checkpoint=str(tmp_path / "quantized"), dtype="float32")
    whole = load_teacher(settings)
    decoder = [f"model.language_model.{name}" for name, _ in whole.model.get_decoder().named_children()]
    # Under two names the CPU is two devices to the library, which then moves what enters a part.
    parts: dict[str, Any] = dict.fromkeys(["model.vision_tower", "model.multi_modal_projector", *decoder], "cpu")
    parts["lm_head"] = torch.device("cpu")
    spread = load_teacher(settings, device_map=parts)
    assert spread.model.hf_device_map == parts
    assert hasattr(spread.model.lm_head, "_hf_hook")
    assert torch.equal(logits(spread.model), logits(whole.model))


@pytest.mark.parametrize("packed_tower", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_teacher_of_bitsandbytes_is_loaded_as_the_library_loads_it(
    tmp_path: Path, bits: int, packed_tower: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    # Its code for processors takes no rows shorter than a block of 64.
    llava = make_tiny_llava(tmp_path / "llava", hidden=64)
    left = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    how = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True},
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=None if packed_tower else left,
    )
    made = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32, quantization_config=how)
    shutil.copytree(llava, tmp_path / "bnb")
    made.save_pretrained(tmp_path / "bnb")
    teacher = teacher_of(tmp_path / "bnb")
    assert torch.equal(logits(teacher.model), logits(made))
    assert scheme_of(teacher.identity.config) == f"bitsandbytes, {bits} bits" + " (fp4)" * (bits == 4)
    teacher.save_vision(tmp_path / "vision")
    assert ("bitsandbytes" in (tmp_path / "vision" / "config.json").read_text()) == packed_tower


def test_the_scheme_is_stored_with_a_vision_tower_that_is_packed_and_with_no_other(llava: Path, tmp_path: Path) -> None:
    teacher = teacher_of(llava)
    teacher.model.config.quantization_config = SCHEMES["GPTQ"][0]
    teacher.save_vision(tmp_path / "dense")
    assert scheme_of(load_config(tmp_path / "dense")) is None
    layer = teacher.model.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    teacher.save_vision(tmp_path / "packed")
    assert scheme_of(load_config(tmp_path / "packed")) == "gptq, 4 bits"


def test_targets_of_a_quantized_teacher_serve_students_where_its_tower_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_tiny_data(tmp_path, num_samples=8)
    make_fp8(tmp_path / "fp8", data.teacher)
    store = extract_here(TinyData(tmp_path / "fp8", data.student_lm, data.samples), tmp_path / "targets")
    assert store.manifest.fingerprint.teacher_config["quantization_config"]["quant_method"] == "fp8"
    spec = resolve_reader_spec(store, data.student_lm, own_vision=False, kd_weight=1.0)
    student = build_student(spec.teacher_folder, data.student_lm, seed=0).state_dict()
    held = load_file(spec.teacher_folder / "model.safetensors")
    assert all(torch.equal(student[name], tensor) for name, tensor in held.items())


def test_a_packed_vision_tower_is_no_students(llava: Path, tmp_path: Path, fp8: tuple[Path, Meant]) -> None:
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=llava)
    with pytest.raises(
        UserError, match=r"is quantized \(fp8 \(e4m3\)\), and a student with the teacher's vision tower"
    ):
        build_student(fp8[0], decoder, 0)


def as_lm(llava: Path, folder: Path, scheme: dict[str, Any]) -> Path:
    decoder = make_tiny_lm(folder.parent / "plain", tokenizer_from=llava)
    write(folder, decoder, load_file(decoder / "model.safetensors"), scheme)
    return folder


SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits (nf4)"),
    "bitsandbytes in 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
    "FP8": ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8 (e4m3)"),
    "compressed-tensors": (INT4, "compressed-tensors (pack-quantized)"),
    "another": ({"quant_method": "somebody's"}, "somebody's"),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_a_student_is_refused_with_its_scheme_before_anything_is_loaded(llava: Path, tmp_path: Path, case: str) -> None:
    scheme, name = SCHEMES[case]
    folder = as_lm(llava, tmp_path / "lm", scheme)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000] + bytes(1000))
    with pytest.raises(UserError) as caught:
        build_student(llava, folder, 0)
    assert f"{folder} is quantized ({name}), and a student needs weights of 16 or 32 bits" in str(caught.value)
    with pytest.raises(UserError, match="and a student needs"):
        resolve_student(folder)


def test_a_scheme_in_the_decoders_config_alone_is_seen(llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gptq, 4 bits"):
        resolve_student(folder)


@pytest.mark.parametrize("scheme", ["gptq", ["gptq"]])
def test_a_scheme_that_is_no_object_is_refused(llava: Path, tmp_path: Path, scheme: object) -> None:
    folder = as_lm(llava, tmp_path / "lm", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    with pytest.raises(UserError, match=r"gptq"):
        resolve_student(folder)


def test_a_quantized_checkpoint_is_evaluated_and_not_exported(fp8: tuple[Path, Meant], tmp_path: Path) -> None:
    assert logits(load_multimodal(fp8[0])).isfinite().all()
    with pytest.raises(UserError, match="an export needs weights of 16 or 32 bits"):
        export_student(fp8[0], tmp_path / "out")


MISSING = {
    "bitsandbytes": "quantizer_bnb_4bit.is_bitsandbytes_available",
    "GPTQ": "quantizer_gptq.is_optimum_available",
    "AWQ": "quantizer_awq.is_gptqmodel_available",
    "compressed-tensors": "quantizer_compressed_tensors.is_compressed_tensors_available",
}


@pytest.mark.parametrize("case", MISSING)
def test_the_package_that_a_teacher_lacks_is_named_before_its_weights_are_read(
    llava: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.quantizers.{MISSING[case]}", lambda *_: False)
    write(tmp_path / "llava", llava, {"a": torch.zeros(1)}, SCHEMES[case][0])
    package = MISSING[case].split(".is_")[1].removesuffix("_available").replace("_", ".")
    with pytest.raises(UserError, match=rf"is quantized \(.*a package that loads it is missing here.*{package}"):
        identify_teacher(TeacherConfig(checkpoint=str(tmp_path / "llava")), on_gpu=False)


def test_a_scheme_that_the_library_does_not_know_is_refused(llava: Path, tmp_path: Path) -> None:
    write(tmp_path / "llava", llava, {"a": torch.zeros(1)}, SCHEMES["another"][0])
    with pytest.raises(UserError, match="quantized with somebody's, which this version of transformers does not load"):
        identify_teacher(TeacherConfig(checkpoint=str(tmp_path / "llava")), on_gpu=False)


def test_weights_that_a_quantized_checkpoint_lacks_are_no_random_numbers(
    fp8: tuple[Path, Meant], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fp8[0], tmp_path / "fp8"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: .*layers\.1\.mlp\.up_proj\.weight"):
        teacher_of(folder)


def test_a_config_beyond_what_its_files_can_hold_is_refused_before_memory_is_taken(
    fp8: tuple[Path, Meant], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fp8[0], tmp_path / "fp8"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 2**31
    (folder / "config.json").write_text(json.dumps(config))
    with limits(), pytest.raises(UserError, match="no quantization packs so many"):
        load_weights(AutoModelForImageTextToText, folder, dtype=torch.float32)


def test_shapes_that_are_kept_beside_packed_weights_are_those_of_the_model(llava: Path, tmp_path: Path) -> None:
    state = json.dumps({"shape": [2**20, 2**20], "quant_type": "nf4", "blocksize": 64, "dtype": "float32"}).encode()
    tensors = load_file(llava / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    write(tmp_path / "llava", llava, tensors, SCHEMES["bitsandbytes"][0])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(tmp_path / "llava"), trust_remote_code=False)
    with limits(), pytest.raises(UserError, match=r"says that .*up_proj\.weight has shape \[1048576, 1048576\]"):
        check_sizes(model, tmp_path / "llava", [tmp_path / "llava" / "model.safetensors"])
