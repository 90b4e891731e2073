import gc
import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.run_file import load_run_file
from pipeline.training import train
from stages.student.data.sample_reader import ReaderSpec, resolve_reader_spec
from stages.student.model.loading import load_student
from stages.student.model.projector_folding import fold_post_connector, take_apart
from stages.student.model.student import Student
from stages.student.run_folder import RunFolder, StageReport
from stages.student.stage_config import STAGES, StageName
from stages.student.training.objective import DistillationObjective
from stages.student.training.setup import StageSetup
from storage.errors import FingerprintMismatch, UserError
from storage.targets.store import TargetStore
from tests.checkpoints import make_tiny_lm
from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp, start_cdp, tree
from tests.pipeline.runs import SETTINGS, run_file
from tests.pipeline.steps import AtEachStep
from tests.processes import kill_when
from tests.recorded_progress import RecordedProgress


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def same_students(found: Path, expected: Path) -> bool:
    """Whether all stages ended with the same files, weights included, to the bit."""
    return all(
        tree(found / stage / "student").keys() == tree(expected / stage / "student").keys()
        and weights(found / stage) == weights(expected / stage)
        for stage in STAGES
    )


def weights(stage: Path) -> bytes:
    return (stage / "student" / "model.safetensors").read_bytes()


def test_each_stage_leaves_a_student_metrics_a_report_and_the_resolved_run_file(
    undisturbed: Path, tiny: TinyWorld, targets: Path
) -> None:
    for stage in STAGES:
        report = StageReport.model_validate_json((undisturbed / stage / "report.json").read_text())
        lines = (undisturbed / stage / "metrics.jsonl").read_text().splitlines()
        assert report.steps == len(lines) > 0
        assert json.loads(lines[-1])["step"] == report.steps
        assert (undisturbed / stage / "student" / "config.json").is_file()
    assert load_run_file(undisturbed / "run.yaml", [], {}) == run_file(tiny, targets, undisturbed)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert list(summary) == list(STAGES)
    assert "attention" in summary["dft"]["losses"]
    assert "kd" not in summary["sft"]["losses"]
    assert RunFolder(undisturbed).last_student() == undisturbed / "sft" / "student"


def test_the_teachers_vision_tower_stays_as_it_was_and_each_stage_trains_what_it_says(
    undisturbed: Path, targets: Path
) -> None:
    vision = load_file(TargetStore.open(targets).teacher_folder() / "model.safetensors")
    dpt, dft, sft = (load_file(undisturbed / stage / "student" / "model.safetensors") for stage in STAGES)
    for student in (dpt, dft, sft):
        assert vision.keys() <= student.keys()
        assert all(torch.equal(student[name], vision[name]) for name in vision)
    changed = {name for name in dpt if not torch.equal(dpt[name], dft[name])}
    assert any("language_model.layers" in name for name in changed)
    assert all("language_model.layers" in name or "post_connector" in name for name in changed)


def test_finished_stages_are_not_trained_again(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    steps: list[object] = []
    reports = train(run_file(tiny, targets, output), STAGES, AtEachStep(lambda *step: steps.append(step)))
    assert steps == []
    assert [report.stage for report in reports] == list(STAGES)
    assert {stage: tree(output / stage) for stage in STAGES} == {stage: tree(undisturbed / stage) for stage in STAGES}


def test_windows_that_the_store_did_not_foresee_are_said_when_the_stage_starts_and_in_its_report(
    tiny: TinyWorld, targets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said_by_now(stage: str, step: float) -> None:
        assert "dft: 1 layers are matched, but the targets hold exact sink masks for" in caplog.text

    run = run_file(tiny, targets, tmp_path / "run", "train.matching.num_matched=1", "train.dft.max_steps=1")
    progress = RecordedProgress(at_step=said_by_now)
    (report,) = train(run, ["dft"], progress)
    assert progress.notes[0].startswith("in step 1 lm ")
    assert ", on average " in progress.notes[0]
    (note,) = report.notes
    assert "extract with teacher.num_matched=1" in note


class Stopped(Exception):
    """The test's own interruption."""


def stop_at(stage: StageName, step: int) -> AtEachStep:
    def stop(name: str, done: int) -> None:
        if (name, done) == (stage, step):
            raise Stopped

    return AtEachStep(stop)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("dpt", 3), ("dft", 4), *(pytest.param(stage, 1, marks=pytest.mark.slow) for stage in ("dpt", "dft"))],
)
def test_a_stopped_stage_goes_on_to_the_same_weights(
    stage: StageName, step: int, tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    with pytest.raises(Stopped):
        train(run, STAGES, stop_at(stage, step))
    # Whatever drew random numbers since must not matter.
    torch.rand(17)
    first: dict[str, int] = {}
    train(run, STAGES, AtEachStep(first.setdefault))
    # The stop comes before its step's own checkpoint.
    assert first[stage] == (step - 1) // 2 * 2 + 1
    assert same_students(tmp_path / "run", undisturbed)


def test_stages_one_by_one_end_with_the_same_weights(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    for number, stage in enumerate(STAGES, 1):
        train(run, [stage])
        assert list(json.loads((tmp_path / "run/summary.json").read_text())) == list(STAGES[:number])
    assert same_students(tmp_path / "run", undisturbed)


def test_a_stage_does_not_go_on_from_another_start(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    with pytest.raises(Stopped):
        train(run, ["dft"], stop_at("dft", 3))
    train(run, ["dpt"])
    before = tree(tmp_path / "run")
    for stages in (["dft"], STAGES):
        with pytest.raises(FingerprintMismatch, match="begun from decoder, now it would start from dpt with weights"):
            train(run, stages)
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize(
    "finished", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half-finished", "finished"]
)
def test_a_stage_does_not_go_on_from_a_stage_before_it_that_was_trained_anew(
    finished: bool, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = run_file(tiny, targets, output)
    train(run, ["dpt"])
    if finished:
        train(run, ["dft"])
    else:
        with pytest.raises(Stopped):
            train(run, ["dft"], stop_at("dft", 3))
    shutil.move(output / "dpt", tmp_path / "dpt")
    train(run_file(tiny, targets, output, "train.dpt.learning_rate=0.01"), ["dpt"])
    before = tree(output)
    with pytest.raises(FingerprintMismatch, match=r"begun from dpt with weights \w{12}, now .* from dpt with weights"):
        train(run, ["dft"])
    assert tree(output) == before

    # The same weights are the same start, whenever they were made.
    shutil.rmtree(output / "dpt")
    train(run, ["dpt", "dft"])
    assert weights(output / "dpt") == weights(tmp_path / "dpt")


def test_what_a_stage_starts_from_is_read_once(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def noted(targets: TargetStore, folder: Path, **settings: Any) -> ReaderSpec:
        read.append(folder)
        return resolve_reader_spec(targets, folder, **settings)

    monkeypatch.setattr("stages.student.training.setup.resolve_reader_spec", noted)
    run = run_file(tiny, targets, tmp_path / "run")
    train(run, ["dpt"])
    train(run, ["dft"])
    assert read == [tiny.student_lm, tmp_path / "run/dpt/student"]


def test_a_stage_that_starts_from_a_student_of_another_decoder_is_refused_and_nothing_is_written(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    for file in ("dpt/stage.json", "dpt/report.json", "run.yaml"):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(undisturbed / file, output / file)
    shutil.copytree(undisturbed / "dpt" / "student", output / "dpt" / "student")
    other = make_tiny_lm(tmp_path / "other", tokenizer_from=tiny.teacher, seed=5)
    before = tree(output)
    found = rf"dpt/student, which was made of a decoder with weights \w{{12}}, but --student is {other} with weights"
    with pytest.raises(FingerprintMismatch, match=found):
        train(run_file(replace(tiny, student_lm=other), targets, output), ["dft"])
    assert tree(output) == before


def test_a_stage_may_begin_from_the_student_of_another_run(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    saved = undisturbed / "dpt" / "student"
    train(run_file(replace(tiny, student_lm=saved), targets, tmp_path / "run"), ["dft"])
    assert weights(tmp_path / "run/dft") == weights(undisturbed / "dft")


@pytest.mark.parametrize("change", ["another tower", "exported"])
def test_a_saved_student_with_another_vision_tower_than_the_targets_teacher_is_refused_and_nothing_is_written(
    change: str, tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    student = load_student(undisturbed / "dpt" / "student")
    if change == "exported":
        student = fold_post_connector(take_apart(student)).build()
        found = r"another model\.multi_modal_projector\.linear_2\.(bias|weight)"
    else:
        student.model.vision_tower.post_layernorm.bias.data += 1e-3
        found = r"another model\.vision_tower\.post_layernorm\.bias"
    shutil.copytree(undisturbed / "dpt" / "student", tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(FingerprintMismatch, match=f"the vision tower of the targets' teacher: it has {found}"):
        train(run_file(replace(tiny, student_lm=tmp_path / "student"), targets, tmp_path / "run"), ["dft"])
    assert not (tmp_path / "run").exists()


def test_stages_with_targets_of_two_teachers_are_refused_and_nothing_is_written(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    manifest = TargetStore.open(targets).manifest
    fingerprint = manifest.fingerprint.model_copy(update={"teacher_weights": "0" * 64})
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_bytes(manifest.model_copy(update={"fingerprint": fingerprint}).to_bytes())
    with pytest.raises(FingerprintMismatch, match=r"targets of different teachers .*: dpt \w{12}, dft 0{12}, sft"):
        train(run_file(tiny, targets, tmp_path / "run", f"train.dft.targets={other}"), STAGES)
    assert not (tmp_path / "run").exists()


def test_a_finished_stage_frees_its_student(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: list[weakref.ref[Student]] = []
    load = StageSetup.load

    def remembered(start: StageSetup) -> Any:
        alive = [student for student in students if student() is not None]
        assert len(alive) <= 1, "besides that of the stage that now saves its own"
        loaded = load(start)
        students.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(StageSetup, "load", remembered)
    train(run_file(tiny, targets, tmp_path / "run"), ["dpt", "dft"])
    gc.collect()
    assert len(students) == 4
    assert [student() for student in students] == [None] * 4


def test_what_the_environment_says_to_accelerate_changes_no_gradient(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    train(run_file(tiny, targets, tmp_path / "run"), ["dpt"])
    assert weights(tmp_path / "run/dpt") == weights(undisturbed / "dpt")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_DEEPSPEED asks for DeepSpeed, which students are not trained"):
        train(run_file(tiny, targets, tmp_path / "other"), ["dpt"])


def test_bookkeeping_may_change_between_a_stop_and_its_resume(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(Stopped):
        train(run_file(tiny, targets, output), STAGES, stop_at("dpt", 3))
    train(run_file(tiny, targets, output, "train.checkpoint.every=1", "train.checkpoint.keep=5"), STAGES)
    assert same_students(output, undisturbed)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("train.dpt.learning_rate=0.5", "dpt.learning_rate"),
        ("train.seed=9", "seed"),
        ("train.lora.rank=2", "lora.rank"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name_and_changes_nothing(
    setting: str, field: str, tiny: TinyWorld, targets: Path, undisturbed: Path
) -> None:
    before = tree(undisturbed)
    with pytest.raises(FingerprintMismatch, match=rf"differs in: {field}\)"):
        train(run_file(tiny, targets, undisturbed, setting), STAGES)
    assert tree(undisturbed) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.dft.kd_temperature=2.0", r"kd_temperature of dft is 2.0, but .* holds .* at \[1.0\] only"),
        (
            "train.matching.student_layers=[30,31]",
            r"student layers \[30, 31\] were asked for, but the decoder has layers 0 to",
        ),
        ("train.matching.num_matched=9", "the student has 4 layers but 9 are to be matched"),
        ("train.dft.subset={subset}", "unknown-key"),
        (
            "train.dft.validation_subset={subset}",
            r"train.dft.validation_subset \(.*\) names 1 samples, .*: unknown-key;",
        ),
    ],
)
def test_a_mistake_in_a_later_stage_is_said_before_the_first_is_trained_and_nothing_is_written(
    setting: str, message: str, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    subset = tmp_path / "subset.txt"
    subset.write_text("unknown-key\n")
    with pytest.raises(UserError, match=message):
        train(run_file(tiny, targets, tmp_path / "out", setting.format(subset=subset)), STAGES)
    assert not (tmp_path / "out").exists()


def test_which_layers_are_matched_may_change_for_a_stage_that_matches_none(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "dpt", tmp_path / "run" / "dpt")
    train(run_file(tiny, targets, tmp_path / "run", "train.matching.num_matched=2"), ["dpt", "dft"])
    assert weights(tmp_path / "run/dpt") == weights(undisturbed / "dpt")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_the_samples_and_leaves_no_student(
    broken: str, tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DistillationObjective.forward

    def break_it(self: DistillationObjective, batch: Any, totals: Any) -> Any:
        loss, terms = forward(self, batch, totals)
        if broken == "loss":
            return loss * float("nan"), terms
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, terms

    monkeypatch.setattr(DistillationObjective, "forward", break_it)
    names = r"\d{9}, \d{9}, \d{9}, \d{9}"
    with pytest.raises(UserError, match=rf"the {broken} is (nan|inf) at step 1; the batch holds samples {names}\."):
        train(run_file(tiny, targets, tmp_path / "run"), ["dpt"])
    assert not (tmp_path / "run/dpt/student").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_training_killed_at_any_moment_of_a_stage_ends_with_the_same_weights(
    stage: StageName, tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm, "--output", output)
    command = ("train-student", *places, *(word for setting in SETTINGS for word in ("--set", setting)))
    wanted = random.Random(stage).randint(1, 3)

    def reached() -> bool:
        metrics = output / stage / "metrics.jsonl"
        return metrics.is_file() and metrics.read_text().count("\n") >= wanted

    kill_when(start_cdp(*command), reached)
    done = cdp(*command)
    assert done.code == 0, done.err
    assert same_students(output, undisturbed)
