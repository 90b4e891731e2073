"""The classes of exported folders do what vLLM's Transformers backend asks of a multimodal model.

vLLM itself is not installed: `vllm_backend.py` does what it does with a folder, in one other process for all cases.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stages.checkpoints.processors import load_processor
from stages.export.export import CARD, export_student
from stages.export.model_card import ExportReport
from stages.student.model.loading import load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from tests.checkpoints import make_tiny_llava
from tests.stages.export import vllm_backend
from tests.stages.export.test_export import make_student
from tests.stages.extracted_families import Extracted
from tests.stages.student.model.test_modeling_any_teacher import ABLE

pytestmark = pytest.mark.slow
Extract = Callable[[str], Extracted]


@dataclass(frozen=True)
class Found:
    """An export, and its logits as vLLM would have them, `[T][V]`, or why it has none."""

    folder: Path
    report: ExportReport
    logits_TV: list[list[float]] | str


DEEPSTACK, UNCOUNTED = "inside its decoder", "cannot count the tokens of a picture"
REFUSED = {"qwen3_vl": DEEPSTACK, "qwen3_vl_moe": DEEPSTACK, "ovis2": UNCOUNTED, "smolvlm": UNCOUNTED}
CASES = [*ABLE, "llava", "llava, not folded"]


@pytest.fixture(scope="module")
def found(extract: Extract, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """By case."""
    top = tmp_path_factory.mktemp("vllm")
    reports = {}
    for case in CASES:
        folder = top / case.replace(", ", "-").replace(" ", "-")
        teacher = top / "llava-teacher"
        if case in ABLE:
            teacher = extract(case).store.teacher_folder()
        elif case == "llava":
            teacher.mkdir()
            load_teacher(TeacherConfig(checkpoint=str(make_tiny_llava(top / "checkpoint")))).save_vision(teacher)
        student = make_student(folder.with_name(f"{folder.name}-student"), teacher, tied=case == "internvl")
        reports[case] = (folder, export_student(student, folder, fold="not" not in case))
        # Beside a config that asks for code of its own the project would not load it there.
        without = shutil.ignore_patterns("config.json", "model*")
        shutil.copytree(folder, folder.with_name(f"{folder.name}-processor"), ignore=without)
    folders = [str(folder) for folder, _ in reports.values()]
    command = [sys.executable, vllm_backend.__file__, str(top / "found.json"), *folders]
    environment = {**os.environ, "HF_MODULES_CACHE": str(top / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((top / "found.json").read_text())
    return {case: Found(*report, answers[str(report[0])]) for case, report in reports.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_an_export_has_the_same_logits_by_the_steps_of_vllm(case: str, found: dict[str, Found]) -> None:
    folder, report, logits = found[case].folder, found[case].report, found[case].logits_TV
    assert not isinstance(logits, str), logits
    assert report.why_not_vllm is None
    assert f"vllm serve {folder.name} --trust-remote-code --model-impl transformers" in (folder / CARD).read_text()
    model, processor = load_multimodal(folder), load_processor(folder)
    text = vllm_backend.question(processor)
    with torch.inference_mode():
        inputs = processor(images=vllm_backend.pictures(processor), text=text, return_tensors="pt")
        expected_TV = model(**inputs).logits[0]
    scale = float(expected_TV.abs().max())
    torch.testing.assert_close(torch.tensor(logits), expected_TV, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_an_export_that_vllm_cannot_serve_says_so(case: str, found: dict[str, Found]) -> None:
    assert isinstance(found[case].logits_TV, str)
    why = found[case].report.why_not_vllm
    assert why is not None
    assert REFUSED[case] in why
    card = (found[case].folder / CARD).read_text()
    assert f"vLLM does not serve this model: {why}" in card
    assert "vllm serve" not in card
