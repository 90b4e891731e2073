"""Students with their own vision tower or tokenizer, through the commands: trained, compared, evaluated, refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pipeline.attention_comparison import compare_with_targets
from pipeline.run_file import RunFile
from pipeline.suite_evaluation import evaluate_suites
from pipeline.training import train
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.student.stage_config import STAGES
from storage.errors import UserError
from tests.checkpoints import CHATML, make_foreign_lm, make_tiny_llava
from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here
from tests.pipeline.runs import SETTINGS, run_file

NO_LOGITS = ("train.dpt.kd_weight=0", "train.dft.kd_weight=0")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run_with(student: Path, tiny: TinyWorld, targets: Path, output: Path, *settings: str) -> RunFile:
    return run_file(tiny, targets, output, *settings).model_copy(update={"student": str(student)})


def test_a_whole_model_is_trained_by_command_and_its_attention_compared(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make_tiny_llava(tmp_path / "student", num_layers=5, hidden=16, seed=9)
    places = ("--samples", tiny.samples, "--targets", targets, "--student", student, "--output", tmp_path / "run")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ("train-student", *places, "--vision", "own", "--stage", "dft", *settings)
    done = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    assert "dft" in done.out
    assert re.search(r"^dft: (\d+) of \1 steps, ", done.err, re.M)
    trained = tmp_path / "run/dft/student"
    assert AutoConfig.from_pretrained(trained).model_type == "llava"
    assert "vision: own" in (tmp_path / "run/run.yaml").read_text()
    found = compare_with_targets(str(tmp_path / "run"), str(tiny.samples), str(targets), 4)
    itself = compare_with_targets(str(tiny.teacher), str(tiny.samples), str(targets), 4)
    assert found.num_samples > 0
    assert 0 < found.mean < itself.mean
    assert itself.mean > 0.99


@pytest.mark.slow
def test_a_student_with_another_tokenizer_goes_through_all_stages_and_is_evaluated(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    foreign = make_foreign_lm(tmp_path / "foreign", CHATML)
    run = run_with(foreign, tiny, targets, tmp_path / "run", *NO_LOGITS)
    reports = train(run, STAGES)
    assert [set(report.losses) - {"loss"} for report in reports] == [{"lm"}, {"lm", "attention"}, {"lm"}]
    saved = json.loads((tmp_path / "run/sft/student/tokenizer.json").read_text())
    assert "<|im_start|>" in saved["model"]["vocab"]
    suites = {"sugarcrepe": load_suite("sugarcrepe", SuiteConfig(data=tiny.pairs, limit=2))}
    results = evaluate_suites(str(tmp_path / "run"), suites, EvaluationConfig(), tmp_path / "evaluated")
    compared = compare_with_targets(str(tmp_path / "run"), str(tiny.samples), str(targets), 4)
    assert results["sugarcrepe"].num_items == {"replace_att": 2, "swap_obj": 2}
    assert compared.num_samples > 0


@pytest.mark.parametrize("way", ["uld", "shared"])
def test_a_student_with_another_tokenizer_learns_logits_by_command_and_the_table_says_of_how_many_rows(
    way: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = make_foreign_lm(tmp_path / "foreign", CHATML)
    places = ("--samples", tiny.samples, "--targets", targets, "--student", student, "--output", tmp_path / "run")
    settings = [word for setting in (*SETTINGS, f"train.dft.kd_alignment={way}") for word in ("--set", setting)]
    done = run_here("train-student", *places, "--stage", "dft", *settings, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run/dft/report.json").read_text())
    assert report["losses"]["kd"] > 0
    said = re.search(
        rf"logits were compared \(kd_alignment {way}\): (\d+) of (\d+) \(", " ".join((done.out + done.err).split())
    )
    assert said is not None, done.out
    assert 0 < int(said[1]) < int(said[2])


def test_a_later_stage_with_a_logit_loss_refuses_another_tokenizer_before_anything_is_written(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    foreign = make_foreign_lm(tmp_path / "foreign")
    run = run_with(foreign, tiny, targets, tmp_path / "run", NO_LOGITS[0])
    with pytest.raises(UserError, match="set kd_weight to 0 in every stage that is trained"):
        train(run, STAGES)
    assert not (tmp_path / "run").exists()


def test_image_tokens_that_disagree_leave_no_student_and_name_both_counts(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    student = make_tiny_llava(tmp_path / "student", num_layers=5, image_size=48)
    run = run_with(student, tiny, targets, tmp_path / "run", "train.vision=own")
    with pytest.raises(UserError, match=r"makes 36 image tokens of its 1 images, the teacher's targets hold 16"):
        train(run, STAGES)
    assert not (tmp_path / "run/dpt/student").exists()
