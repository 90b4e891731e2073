"""An export loads where this project is not, computes what the student computes, and generates in batches.

All cases are exported here and tried in one other process, in which no module of the project can be imported.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaProcessor

import stages.export.export as export_module
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.export.export import Dtype, export_student
from stages.export.model_card import ExportReport
from stages.student.model.build import build_student
from stages.student.model.chat import Chat
from stages.student.model.inputs import model_inputs
from stages.student.model.loading import load_multimodal
from stages.student.model.projector_folding import ModelParts, fold_post_connector
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import StoreUnavailable, UserError
from tests.checkpoints import draw_random_image, make_tiny_llava, make_tiny_lm
from tests.stages.extracted_families import Extracted
from tests.tiny_families import RECIPES, make_tiny_family

QUESTIONS = ("Is it red?", "What is the color of the square that is left of the green triangle?")
LATE_IMAGE_ID = 340

ELSEWHERE = """
import json, sys
for name in ("stages", "storage", "pipeline", "examples"):
    sys.modules[name] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
questions, folders = json.loads(sys.argv[2]), sys.argv[3:]
found = {}
for folder in folders:
    with open(f"{folder}/export.json") as file:
        code = json.load(file)["custom_code"] is not None
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=code).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**load_file(f"{folder}.inputs")).logits
    save_file({"logits": logits.contiguous()}, f"{folder}.logits")

    images = [Image.open(f"{folder}.{number}.png") for number in range(len(questions))]
    texts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    def generated(images, texts, **settings):
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, **settings)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    pairs = [([image], [text]) for image, text in zip(images, texts)]
    found[folder] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "single": [generated(*pair)[0] for pair in pairs],
        "uncached": [generated(*pair, use_cache=False)[0] for pair in pairs],
        "batch": generated([[image] for image in images], texts),
    }
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


ELSEWHERE_AS_STORED = """
import json, sys
for name in ("stages", "storage", "pipeline", "examples"):
    sys.modules[name] = None
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    with open(f"{folder}/export.json") as file:
        code = json.load(file)["custom_code"] is not None
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=code)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.new("RGB", (48, 48), "red")
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs, min_new_tokens=4, max_new_tokens=4)
    # As stored, and what the weights come to in float32.
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    with torch.inference_mode():
        logits = model.float()(**load_file(f"{folder}.inputs")).logits[0]
    found[folder] = {
        "class": type(model).__name__,
        "dtypes": dtypes,
        "new_tokens": output.shape[1] - inputs["input_ids"].shape[1],
        "logits": logits.tolist(),
    }
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


@dataclass(frozen=True)
class Exported:
    """One export, and what the other process found of it."""

    student: Path
    folder: Path
    report: ExportReport
    expected_TV: Tensor
    logits_TV: Tensor
    found: dict[str, Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a target store keeps of a teacher of width 32."""
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint = make_tiny_llava(folder / "checkpoint")
    (folder / "teacher").mkdir()
    load_teacher(TeacherConfig(checkpoint=str(checkpoint))).save_vision(folder / "teacher")
    return folder / "teacher"


def make_student(
    folder: Path,
    teacher_folder: Path,
    *,
    hidden: int = 24,
    vocab_size: int = 340,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A student as a stage leaves it, its post-connector's bias not at zero."""
    decoder = make_tiny_lm(
        folder.with_name(f"{folder.name}-lm"), tokenizer_from=teacher_folder, hidden=hidden, vocab_size=vocab_size
    )
    if tied:
        config = json.loads((decoder / "config.json").read_text())
        (decoder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    student = build_student(teacher_folder, decoder, seed=0)
    torch.nn.init.normal_(student.model.post_connector.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(student.model.post_connector.bias, generator=torch.Generator().manual_seed(2))
    student.to(dtype).save_pretrained(folder)
    load_processor(teacher_folder).save_pretrained(folder)
    return folder


def move_image_token(folder: Path) -> Path:
    """Gives the placeholder an id past the student's vocabulary, as a teacher with an added token has it."""
    old = load_processor(folder)
    tokenizer = old.tokenizer
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    tokenizer.image_token = "<picture>"
    template = old.chat_template.replace("<image>", "<picture>")
    LlavaProcessor(
        image_processor=old.image_processor,
        tokenizer=tokenizer,
        patch_size=old.patch_size,
        vision_feature_select_strategy=old.vision_feature_select_strategy,
        chat_template=template,
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == LATE_IMAGE_ID
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": LATE_IMAGE_ID}))
    return folder


@pytest.fixture(scope="module")
def exports(
    teacher: Path, extract: Callable[[str], Extracted], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """All cases by name."""
    top = tmp_path_factory.mktemp("exports")
    students = {
        "narrow": make_student(top / "narrow", teacher),
        "wide": make_student(top / "wide", teacher, hidden=40),
        "equal": make_student(top / "equal", teacher, hidden=32),
        "late narrow": move_image_token(make_student(top / "late-narrow", teacher)),
        "late wide": move_image_token(make_student(top / "late-wide", teacher, hidden=40)),
        "late tied": move_image_token(make_student(top / "late-tied", teacher, hidden=40, tied=True)),
        "own vision": shutil.copytree(teacher.with_name("checkpoint"), top / "own"),
        "tiles": make_student(top / "tiles", extract("llava_next").store.teacher_folder()),
    }
    cases = [(name, True) for name in students] + [("narrow", False), ("tiles", False)]
    reports, expected = {}, {}
    rng = random.Random(0)
    for name, fold in cases:
        case = name if fold else f"{name}, not folded"
        folder = top / "out" / case.replace(" ", "-").replace(",", "")
        reports[case] = (students[name], folder, export_student(students[name], folder, fold=fold))
        images = [draw_random_image(rng).resize(size) for size in ((48, 48), (90, 30))]
        for number, image in enumerate(images):
            image.save(f"{folder}.{number}.png")
        student, processor = load_multimodal(students[name]), load_processor(students[name])
        encoder = ConversationEncoder(processor, student.config.image_token_id, 10_000)
        inputs = model_inputs(student, [encoder.encode_pair(QUESTIONS[1], "It is red.", images[1:])])
        save_file(inputs, f"{folder}.inputs")
        with torch.inference_mode():
            expected[case] = student(**inputs).logits[0]
    command = [
        sys.executable,
        "-c",
        ELSEWHERE,
        str(top / "found.json"),
        json.dumps(QUESTIONS),
        *(str(folder) for _, folder, _ in reports.values()),
    ]
    environment = {**os.environ, "HF_MODULES_CACHE": str(top / "modules")}
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((top / "found.json").read_text())
    return {
        case: Exported(*report, expected[case], load_file(f"{report[1]}.logits")["logits"][0], found[str(report[1])])
        for case, report in reports.items()
    }


DEFAULT_AND_SAME: dict[str, Dtype | None] = {"default": None, "same": "float32"}
CASES = {
    "narrow": ("CompoDistillStudentForConditionalGeneration", "modeling_compodistill.py", "folded", 0),
    "narrow, not folded": ("CompoDistillStudentForConditionalGeneration", "modeling_compodistill.py", "kept", 0),
    "late narrow": ("CompoDistillStudentForConditionalGeneration", "modeling_compodistill.py", "folded", 1),
    "wide": ("LlavaForConditionalGeneration", None, "folded", 0),
    "equal": ("LlavaForConditionalGeneration", None, "folded", 0),
    "late wide": ("LlavaForConditionalGeneration", None, "folded", 1),
    "late tied": ("LlavaForConditionalGeneration", None, "folded", 1),
    "own vision": ("LlavaForConditionalGeneration", None, "none", 0),
    "tiles": ("AnyTeacherStudentForConditionalGeneration", "modeling_any_teacher.py", "folded", 0),
    "tiles, not folded": ("AnyTeacherStudentForConditionalGeneration", "modeling_any_teacher.py", "kept", 0),
}
"""Class, modelling file, what became of the post-connector, rows added to the vocabulary."""


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_of_the_stock_class_where_it_can_be_and_says_what_it_is(
    case: str, exports: dict[str, Exported]
) -> None:
    exported, report = exports[case], exports[case].report
    assert (report.model_class, report.custom_code, report.post_connector, report.added_rows) == CASES[case]
    assert exported.found["class"] == report.model_class
    home = "transformers." if report.custom_code is None else "transformers_modules."
    assert exported.found["module"].startswith(home)
    beside = {"positions_3d.py"} if report.custom_code == "modeling_any_teacher.py" else set()
    assert {path.name for path in exported.folder.glob("*.py")} == {report.custom_code, *beside} - {None}
    assert ("auto_map" in json.loads((exported.folder / "config.json").read_text())) == (report.custom_code is not None)
    assert ExportReport.model_validate_json((exported.folder / "export.json").read_text()) == report
    assert str(exported.student.parent) not in "".join(
        path.read_text("utf-8") for path in exported.folder.iterdir() if path.suffix in (".json", ".md")
    )


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_the_students_logits_where_only_transformers_is(case: str, exports: dict[str, Exported]) -> None:
    exported = exports[case]
    num_ids = exported.expected_TV.shape[1]
    assert exported.logits_TV.shape[1] == num_ids + exported.report.added_rows
    found_TV = exported.logits_TV[:, :num_ids]
    if exported.report.post_connector == "folded":
        scale = float(exported.expected_TV.abs().max())
        torch.testing.assert_close(found_TV, exported.expected_TV, atol=1e-5 * scale, rtol=0)
        assert exported.report.logit_error <= 1e-5 * exported.report.logit_scale
    else:
        assert torch.equal(found_TV, exported.expected_TV)
        assert exported.report.logit_error == 0


@pytest.mark.parametrize("case", CASES)
def test_an_export_generates_the_same_with_a_cache_without_one_and_in_a_padded_batch(
    case: str, exports: dict[str, Exported]
) -> None:
    found = exports[case].found
    assert found["single"] == found["uncached"]
    assert found["single"] == found["batch"]
    assert all(len(tokens) == 8 for tokens in found["single"])
    never = {exports[case].report.image_token_id, LATE_IMAGE_ID}
    assert not never & {token for tokens in found["single"] for token in tokens}


def test_tied_weights_stay_tied(exports: dict[str, Exported]) -> None:
    tied, untied = exports["late tied"], exports["late wide"]
    assert "lm_head.weight" not in load_file(tied.folder / "model.safetensors")
    assert untied.report.parameters - tied.report.parameters == 341 * 40


def test_a_processor_that_also_reads_videos_is_saved_so_that_the_library_asks_for_torchvision_only(
    extract: Callable[[str], Extracted], tmp_path: Path
) -> None:
    student = make_student(tmp_path / "student", extract("qwen2_vl").store.teacher_folder())
    report = export_student(student, tmp_path / "out")
    assert report.post_connector == "folded"
    with pytest.raises(ImportError, match="Qwen2VLVideoProcessor requires the Torchvision library"):
        AutoProcessor.from_pretrained(tmp_path / "out")
    assert load_processor(tmp_path / "out").tokenizer.padding_side == "left"


@pytest.mark.parametrize("model_type", sorted(RECIPES))
def test_a_model_of_the_library_is_exported_as_it_is_and_answers(model_type: str, tmp_path: Path) -> None:
    """What a student with its own vision tower is."""
    checkpoint = make_tiny_family(tmp_path / "model", model_type)
    report = export_student(checkpoint, tmp_path / "out")
    assert (report.custom_code, report.post_connector, report.logit_error) == (None, "none", 0)
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", checkpoint))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    image = draw_random_image(random.Random(1))
    answers = {
        Chat(load_multimodal(folder), load_processor(folder), image, 6).ask(QUESTIONS[0], lambda _: None)
        for folder in (tmp_path / "out", checkpoint)
    }
    assert len(answers) == 1
    assert answers != {""}


def test_weights_of_half_precision_stay_so_and_the_report_says_what_folding_changed(
    teacher: Path, tmp_path: Path
) -> None:
    student = make_student(tmp_path / "student", teacher, dtype=torch.bfloat16)
    # An empty folder may be there already.
    (tmp_path / "out").mkdir()
    report = export_student(student, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert report.dtype == "bfloat16"
    assert 0 < report.logit_error < 0.05 * report.logit_scale
    assert export_student(student, tmp_path / "kept", fold=False).logit_error == 0


ROUNDED: dict[str, tuple[Dtype, bool, str]] = {
    "narrow": ("bfloat16", True, "CompoDistillStudentForConditionalGeneration"),
    "narrow, not folded": ("float16", False, "CompoDistillStudentForConditionalGeneration"),
    "wide": ("float16", True, "LlavaForConditionalGeneration"),
    "tiles": ("bfloat16", True, "AnyTeacherStudentForConditionalGeneration"),
    "own vision": ("bfloat16", True, "LlavaForConditionalGeneration"),
}
"""Precision, whether folded, class."""


@pytest.mark.slow
def test_an_export_of_another_precision_loads_in_it_where_only_transformers_is_and_says_what_rounding_changed(
    teacher: Path, extract: Callable[[str], Extracted], tmp_path: Path
) -> None:
    students = {
        "narrow": make_student(tmp_path / "narrow", teacher),
        "wide": make_student(tmp_path / "wide", teacher, hidden=40),
        "tiles": make_student(tmp_path / "tiles", extract("llava_next").store.teacher_folder()),
        "own vision": shutil.copytree(teacher.with_name("checkpoint"), tmp_path / "own"),
    }
    reports, exact = {}, {}
    for case, (dtype, fold, _) in ROUNDED.items():
        source = students[case.split(",")[0]]
        folder = tmp_path / "out" / case.replace(" ", "-").replace(",", "")
        reports[folder] = case, export_student(source, folder, dtype=dtype, fold=fold)
        student, processor = load_multimodal(source), load_processor(source)
        encoder = ConversationEncoder(processor, student.config.image_token_id, 10_000)
        probe = encoder.encode_pair(*export_module._PROBE, [export_module._picture()])
        inputs = model_inputs(student, [probe])
        save_file(inputs, f"{folder}.inputs")
        with torch.inference_mode():
            exact[folder] = student(**inputs).logits[0]
    command = [sys.executable, "-c", ELSEWHERE_AS_STORED, str(tmp_path / "found.json"), *map(str, reports)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for folder, (case, report) in reports.items():
        dtype, _, model_class = ROUNDED[case]
        there = found[str(folder)]
        assert (there["class"], there["dtypes"], there["new_tokens"]) == (model_class, [f"torch.{dtype}"], 4), case
        assert (report.dtype, report.trained_dtype) == (dtype, "float32")
        assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
        config = json.loads((folder / "config.json").read_text())
        assert {config["dtype"], config["text_config"]["dtype"]} == {dtype}
        difference = float((torch.tensor(there["logits"]) - exact[folder]).abs().max())
        assert difference == pytest.approx(report.logit_error, rel=1e-3), case
        # Folding alone changes a thousandth of it.
        assert report.rounding_error == pytest.approx(report.logit_error, rel=1e-2)
        assert 1e-4 * report.logit_scale < report.rounding_error < 0.1 * report.logit_scale
        card = (folder / "README.md").read_text()
        assert f"Rounding the weights from float32 alone changes logits by at most {report.rounding_error:.2g}." in card


def test_the_precision_that_the_weights_have_changes_nothing(teacher: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", teacher)
    reports = [export_student(student, tmp_path / name, dtype=dtype) for name, dtype in DEFAULT_AND_SAME.items()]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in DEFAULT_AND_SAME]
    assert files[0] == files[1]
    assert {(report.dtype, report.trained_dtype, report.rounding_error) for report in reports} == {
        ("float32", "float32", 0.0)
    }
    assert "rounded from" not in (tmp_path / "same" / "README.md").read_text()


def test_weights_that_the_precision_does_not_hold_are_refused_and_nothing_is_left(
    teacher: Path, tmp_path: Path
) -> None:
    student = make_student(tmp_path / "student", teacher)
    tensors = load_file(student / "model.safetensors")
    tensors["model.post_connector.bias"][0] = 1e5
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"rounded to torch.float16 differ .* nothing was written. Export with another"):
        export_student(student, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.glob("out*"))
    assert export_student(student, tmp_path / "out", dtype="bfloat16").dtype == "bfloat16"


def test_answers_end_where_those_of_the_template_do(teacher: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", teacher, vocab_size=341)
    processor = load_processor(student)
    processor.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    processor.chat_template = processor.chat_template.replace("eos_token", "'<|im_end|>'")
    processor.save_pretrained(student)
    report = export_student(student, tmp_path / "out")
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == report.end_token_ids == [0, 340]


@pytest.mark.parametrize("holds", ["a folder with a file", "a file"])
def test_an_output_that_holds_something_is_refused_and_stays(holds: str, teacher: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", teacher)
    kept = tmp_path / "out" / "kept" if holds == "a folder with a file" else tmp_path / "out"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match="out holds something already; name a new folder"):
        export_student(student, tmp_path / "out")
    assert kept.read_text() == "mine"


def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(tmp_path / "student", teacher)

    def wrong(parts: ModelParts) -> ModelParts:
        folded = fold_post_connector(parts)
        folded.tensors["model.multi_modal_projector.linear_2.bias"] += 0.1
        return folded

    monkeypatch.setattr(export_module, "fold_post_connector", wrong)
    with pytest.raises(UserError, match=r"logits differ from the student's by .* nothing was written"):
        export_student(student, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_that_fails_half_way_leaves_nothing_and_the_next_one_is_whole(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(tmp_path / "student", teacher)

    def full(*_: object) -> None:
        assert list(tmp_path.glob("out.*.partial/model.safetensors"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "_difference", full)
        with pytest.raises(StoreUnavailable, match="out: No space left"):
            export_student(student, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    export_student(student, tmp_path / "out")
    assert {"README.md", "export.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_model_without_images_or_a_chat_template_is_refused(teacher: Path, tmp_path: Path) -> None:
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=teacher)
    with pytest.raises(UserError, match="is of type qwen2, which takes no images"):
        export_student(decoder, tmp_path / "out")
    student = make_student(tmp_path / "student", teacher)
    (student / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no \(default\) chat template"):
        export_student(student, tmp_path / "out")
