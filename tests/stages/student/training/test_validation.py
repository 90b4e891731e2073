"""Losses on held-out samples: what they are, where they are kept, and that training does not notice them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.attention.capture import enable_capture
from stages.settings import validated
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.model.loading import load_student
from stages.student.run_folder import StageFolder, ValidationReport
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import TrainingStopped
from stages.student.training.train_config import TrainConfig
from storage.errors import FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Mixture, Source, StreamConfig, mixture_stream
from storage.targets.store import TargetStore
from tests.recorded_progress import RecordedProgress
from tests.stages.distilled import extract_here, make_tiny_data
from tests.stages.student.validated_run import HELD_OUT, SETTINGS, Stopped, stop_at, train_validated

TERMS = {"loss", "lm", "kd", "attention"}
LISTED: dict[str, Any] = {"validation": {"keys": list(HELD_OUT), "every": 1}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 samples, a fifth of them text alone, and the lists `held.txt` and `rest.txt`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("validation")
    extract_here(make_tiny_data(folder), folder / "targets", num_matched=2)
    (folder / "held.txt").write_text("\n".join(HELD_OUT))
    every = (f"{number:09d}" for number in range(20))
    (folder / "rest.txt").write_text("\n".join(key for key in every if key not in HELD_OUT))
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """A stage of six steps that measured after each."""
    train_validated(folder, "measured", LISTED)
    return folder / "measured"


def weights(stage: Path) -> bytes:
    return (stage / "student" / "model.safetensors").read_bytes()


def lines(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def measurements(stage: Path) -> dict[int, dict[str, float]]:
    """Losses on the held-out samples, by step."""
    found = {}
    for line in lines(stage):
        if "validation/loss" in line:
            assert line["step"] not in found
            found[int(line["step"])] = {term: line[f"validation/{term}"] for term in TERMS}
            assert line["validation/seconds"] > 0
    return found


def training_lines(stage: Path) -> list[dict[str, float]]:
    timed = ("seconds", "validation/seconds")
    return [{n: v for n, v in line.items() if n not in timed} for line in lines(stage) if "loss" in line]


def report_of(stage: Path) -> ValidationReport:
    found = StageFolder(stage).report().validation
    assert found is not None
    return found


def test_the_losses_are_those_of_one_batch_of_all_held_out_samples_without_dropout(
    folder: Path, measured: Path
) -> None:
    targets = TargetStore.open(folder / "targets")
    student = load_student(measured / "student").eval()
    enable_capture(student)
    reader = resolve_reader_spec(targets, measured / "student", own_vision=False, kd_weight=1.0).reader
    matching, _ = match_layers(6, targets.manifest, MatchingConfig(), sink_mask=True)
    source = Source(SampleSet.open(folder / "samples"), targets, subset=folder / "held.txt")
    stream = mixture_stream(
        Mixture([source], StreamConfig(seed=0, batch_size=5)), rank=0, world_size=1, epochs=range(1)
    )
    (samples,) = stream
    batch = Collator(reader)(samples)
    logits = targets.manifest.fingerprint.logit_codec
    objective = DistillationObjective(student, DistilledFinetuning(), logits, matching)
    with torch.no_grad():
        loss, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image))
    found = report_of(measured)
    assert found.losses.keys() == TERMS
    # Otherwise a mean of the microbatches' means would do as well.
    assert (len(batch.keys), batch.num_with_image) == (5, 3)
    expected = {"loss": float(loss), **{name: float(value) for name, value in terms.items()}}
    assert found.losses == pytest.approx(expected, rel=1e-5)


def test_a_measurement_changes_nothing_that_is_trained_and_no_held_out_sample_is_trained_on(
    folder: Path, measured: Path
) -> None:
    report = train_validated(folder, "unmeasured", {}, subset=folder / "rest.txt")
    assert weights(folder / "unmeasured") == weights(measured)
    assert training_lines(folder / "unmeasured") == training_lines(measured)
    assert (report.validation, report.samples) == (None, 30)


def test_each_measurement_is_in_the_metrics_and_the_last_one_in_the_report(folder: Path) -> None:
    progress = RecordedProgress()
    report = train_validated(folder, "said", {"validation": {**LISTED["validation"], "every": 4}}, progress=progress)
    found = measurements(folder / "said")
    assert list(found) == [4, 6]
    assert report.validation is not None
    assert report.validation.losses == found[6]
    assert report.validation.samples == 5
    assert 0 < report.validation.time_share < 1
    fourth, last = progress.messages
    assert f"dft: validation after step 4: lm {found[4]['lm']:.3f}, kd {found[4]['kd']:.3f}, attention " in fourth
    assert f", in all {found[6]['loss']:.3f} (5 held-out samples, " in last
    assert "validation: 5 of 5 held-out samples" in progress.notes
    # Also where nothing but the last line of a stage is shown.
    assert f"validation after step 6 lm {found[6]['lm']:.3f}" in progress.notes[-1]


@pytest.mark.parametrize("step", [3, 6])
def test_a_stage_that_was_stopped_goes_on_to_the_same_weights_and_measurements(
    step: int, folder: Path, measured: Path
) -> None:
    name = f"stopped-{step}"
    with pytest.raises(Stopped):
        train_validated(folder, name, LISTED, progress=stop_at(step))
    torch.rand(17)
    train_validated(folder, name, LISTED)
    assert weights(folder / name) == weights(measured)
    assert measurements(folder / name) == measurements(measured)
    assert report_of(folder / name).losses == report_of(measured).losses


@pytest.mark.parametrize("step", [2, 6])
def test_a_request_to_stop_ends_a_measurement_which_is_made_when_the_stage_goes_on(
    step: int, folder: Path, measured: Path
) -> None:
    name, progress = f"asked-{step}", RecordedProgress()

    def asked() -> bool:
        # Some samples are measured after that step, not all.
        return len(progress.steps) == step and progress.notes[-1].startswith("validation: ")

    settings = {"validation": {**LISTED["validation"], "every": step}, "dft": {**SETTINGS["dft"], "batch_size": 4}}
    with pytest.raises(TrainingStopped, match=f"stopped dft after step {step}, which is saved"):
        train_validated(folder, name, settings, progress=progress, should_stop=asked)
    assert not measurements(folder / name)
    train_validated(folder, name, settings)
    train_validated(folder, f"{name}-not", settings)
    assert weights(folder / name) == weights(folder / f"{name}-not")
    assert measurements(folder / name) == measurements(folder / f"{name}-not")


@pytest.mark.parametrize(
    ("validation", "named"),
    [
        ({}, "validation.keys"),
        ({"keys": list(HELD_OUT[1:])}, "validation.keys"),
        ({"share": 0.4}, r"validation.keys, validation.share"),
    ],
    ids=["off", "others", "share"],
)
def test_a_stage_does_not_go_on_with_other_held_out_samples(
    validation: dict[str, Any], named: str, folder: Path, measured: Path
) -> None:
    with pytest.raises(FingerprintMismatch, match=rf"differs in: {named}\)"):
        train_validated(folder, measured.name, {"validation": validation})


def test_a_list_may_be_moved_and_measurements_may_be_rarer_but_the_list_stays_the_same(
    folder: Path, tmp_path: Path
) -> None:
    def settings(path: Path, every: int = 2) -> dict[str, Any]:
        return {"validation": {"subset": str(path), "every": every}}

    with pytest.raises(Stopped):
        train_validated(folder, "listed", settings(folder / "held.txt"), progress=stop_at(3))
    with pytest.raises(FingerprintMismatch, match=r"differs in: validation_subset\)"):
        train_validated(folder, "listed", {})
    moved = tmp_path / "moved.txt"
    moved.write_text("\n".join(HELD_OUT[1:]))
    with pytest.raises(FingerprintMismatch, match=r"differs in: validation_subset\)"):
        train_validated(folder, "listed", settings(moved))
    moved.write_text("\n".join(reversed(HELD_OUT)))
    train_validated(folder, "listed", settings(moved, every=5))
    assert list(measurements(folder / "listed")) == [2, 5, 6]


def test_a_stage_begun_without_held_out_samples_is_not_gone_on_with_them(folder: Path) -> None:
    with pytest.raises(Stopped):
        train_validated(folder, "begun", {}, progress=stop_at(1))
    with pytest.raises(FingerprintMismatch, match=r"differs in: validation.share\)"):
        train_validated(folder, "begun", {"validation": {"share": 0.3}})


def test_a_stage_may_have_a_list_of_its_own(folder: Path) -> None:
    (folder / "two.txt").write_text("\n".join(HELD_OUT[:2]))
    own = {**SETTINGS["dft"], "max_steps": 1, "validation_subset": str(folder / "two.txt")}
    report = train_validated(folder, "own", {"dft": own, "validation": {"share": 0.4}})
    assert report.validation is not None
    assert report.validation.samples == 2


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"share": 0}, "validation.share: Input should be greater than 0"),
        ({"share": 1}, "share: Input should be less than 1"),
        ({"share": 0.1, "every": 0}, "every: Input should be greater than or equal to 1"),
        ({"share": 0.1, "keys": ["a"]}, "expected one of share, keys, subset; leave out share or keys"),
        ({"share": 1e-9}, r"train.validation.share 1e-09 holds out none of 20 samples"),
        ({"keys": ["a", HELD_OUT[0]]}, r"train.validation.keys names 2 samples, .* no targets for 1 of them: a;"),
        ({"subset": "{folder}/missing.txt"}, r"missing.txt cannot be read: .*expected a text file of keys"),
        (
            {"subset": "{folder}/unknown.txt"},
            r"train.validation.subset \(.*unknown.txt\) names 1 samples, .*: unknown;",
        ),
    ],
)
def test_a_choice_that_cannot_be_used_is_refused_before_a_student_is_loaded(
    validation: dict[str, Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "unknown.txt").write_text("unknown")
    given = {name: value.format(folder=folder) if name == "subset" else value for name, value in validation.items()}
    monkeypatch.delattr(StageSetup, "load")
    with pytest.raises(UserError, match=message):
        train_validated(folder, str(tmp_path / "refused"), {"validation": given})


def test_a_loss_that_is_not_finite_ends_the_stage_with_the_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DistillationObjective.forward

    def broken(self: DistillationObjective, batch: Any, totals: BatchTotals) -> Any:
        loss, terms = forward(self, batch, totals)
        return loss, terms if self.training else {**terms, "kd": terms["kd"] * float("nan")}

    monkeypatch.setattr(DistillationObjective, "forward", broken)
    with pytest.raises(UserError, match=r"the validation kd is nan at step 1; the batch holds samples 0000"):
        train_validated(folder, "broken", LISTED)


@pytest.mark.slow
def test_loader_processes_measure_the_same(folder: Path, measured: Path) -> None:
    train_validated(folder, "loaded", {**LISTED, "loader": {"microbatch_size": 2, "num_workers": 2}})
    assert weights(folder / "loaded") == weights(measured)
    assert measurements(folder / "loaded") == measurements(measured)


def on_two_ranks(folder: Path, name: str, settings: dict[str, Any], *stop: str) -> Path:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.stages.student.validated_run", str(folder), name, json.dumps(settings), *stop]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_measure_what_one_does_are_not_disturbed_and_go_on_to_the_same_weights(
    strategy: str, folder: Path
) -> None:
    # Dropout draws on each rank for itself.
    same = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    train_validated(folder, f"one-for-{strategy}", {**same, **LISTED})
    expected = measurements(folder / f"one-for-{strategy}")
    spread = {"parallel": {"strategy": strategy}}
    found = measurements(on_two_ranks(folder, f"two-{strategy}", {**same, **LISTED, **spread}))
    assert found.keys() == expected.keys()
    for step, losses in expected.items():
        assert found[step] == pytest.approx(losses, rel=2e-4)

    # With dropout: measured after each step, at the end alone, and stopped after a measurement.
    often = on_two_ranks(folder, f"often-{strategy}", {**LISTED, **spread})
    rarely = on_two_ranks(
        folder, f"rarely-{strategy}", {"validation": {**LISTED["validation"], "every": 100}, **spread}
    )
    assert weights(often) == weights(rarely)
    assert measurements(rarely) == {6: measurements(often)[6]}
    on_two_ranks(folder, f"killed-{strategy}", {**LISTED, **spread}, "3")
    killed = on_two_ranks(folder, f"killed-{strategy}", {**LISTED, **spread})
    assert weights(killed) == weights(often)
    assert measurements(killed) == measurements(often)


def test_settings_that_say_nothing_hold_out_nothing() -> None:
    assert validated(TrainConfig, {"validation": {"every": 3}}, "a test").validation.share is None
