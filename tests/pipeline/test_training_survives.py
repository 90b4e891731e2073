"""Training that is asked to stop, killed, or runs out of disk: what is saved, what is said, what it ends with."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pipeline.runtime.interruption import SAVED_EXIT_CODE, Interrupted
from pipeline.training import train
from stages.student.stage_config import STAGES
from storage.errors import StoreUnavailable, UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import SETTINGS, run_file
from tests.pipeline.steps import AtEachStep
from tests.pipeline.test_distributed import ONE, TORCHRUN, assert_same_training
from tests.pipeline.training_kills import kill_stages, weights
from tests.processes import PATIENCE_S, descendants, runs_until, wait_until_dead


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def assert_same_students(found: Path, expected: Path) -> None:
    for stage in STAGES:
        assert weights(found, stage) == weights(expected, stage), stage


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_a_run_that_is_asked_to_stop_saves_where_it_is_and_goes_on_to_the_same_weights(
    step: int, tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    done: list[int] = []
    with pytest.raises(Interrupted, match=rf"stopped dpt after step {step}, which is saved; run the same") as stop:
        train(run, STAGES, AtEachStep(lambda _, step: done.append(step)), lambda: len(done) == step)
    assert stop.value.exit_code == SAVED_EXIT_CODE == 75
    assert (tmp_path / f"run/dpt/checkpoints/step-{step:08d}").is_dir()
    again: list[int] = []
    train(run, STAGES, AtEachStep(lambda _, step: again.append(step)))
    assert again[0] == step + 1
    assert_same_students(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run = run_file(tiny, targets, tmp_path / "run")
    done: list[int] = []
    with pytest.raises(Interrupted):
        train(run, STAGES, AtEachStep(lambda _, step: done.append(step)), lambda: len(done) == 4)
    train(run, STAGES)
    assert_same_students(tmp_path / "run", undisturbed)


def test_metrics_and_starts_of_a_resumed_run_are_told_once_each(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")

    def crash(_: str, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, ["dpt"], AtEachStep(crash))
    # Step 3 was written down, but is no part of a checkpoint.
    assert (tmp_path / "run/dpt/metrics.jsonl").read_text().count("\n") >= 3
    train(run, ["dpt"])
    lines, wanted = (
        [json.loads(line) for line in (folder / "dpt/metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", undisturbed)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]
    starts = [json.loads(line) for line in (tmp_path / "run/provenance.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0]["stages"]["dpt"].keys() == {"decoder", "targets", "teacher", "samples"}
    assert starts[0]["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("optimizer.safetensors", "step-00000004 is damaged (optimizer.safetensors has another sha256"),
        ("state.json", "step-00000004 is damaged (state.json has another digest"),
    ],
)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    file: str,
    said: str,
    tiny: TinyWorld,
    targets: Path,
    undisturbed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    done: list[int] = []
    with pytest.raises(Interrupted):
        train(run, ["dpt"], AtEachStep(lambda _, step: done.append(step)), lambda: len(done) == 4)
    checkpoints = tmp_path / "run/dpt/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    damaged = checkpoints / "step-00000004" / file
    data = bytearray(damaged.read_bytes())
    # In the state, the number of the step.
    place = -1 if file.endswith("safetensors") else data.index(b'"step": ') + len('"step": ')
    data[place] ^= 1
    damaged.write_bytes(data)
    again: list[int] = []
    train(run, ["dpt"], AtEachStep(lambda _, step: again.append(step)))
    assert again[0] == 3
    assert said in caplog.text
    assert weights(tmp_path / "run", "dpt") == weights(undisturbed, "dpt")


def test_when_all_checkpoints_are_damaged_nothing_is_trained_over_them(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run")
    done: list[int] = []
    with pytest.raises(Interrupted):
        train(run, ["dpt"], AtEachStep(lambda _, step: done.append(step)), lambda: len(done) == 1)
    (tmp_path / "run/dpt/checkpoints/step-00000001/trained.safetensors").unlink()
    with pytest.raises(UserError, match=r"all 1 checkpoints in .* are damaged; remove it"):
        train(run, ["dpt"])


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before_and_says_so(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path, small_disk: Path
) -> None:
    output = small_disk / "run"
    run = run_file(tiny, targets, output)

    def fill(_: str, step: int) -> None:
        if step == 3:
            room = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - 2**13))

    with pytest.raises(
        StoreUnavailable, match=r"step 4 was not saved; the newest one, .*step-00000002, is whole: .*No"
    ):
        train(run, ["dpt"], AtEachStep(fill))
    (small_disk / "filler").unlink()
    assert not list(output.rglob("*.partial"))
    shutil.move(output, tmp_path / "roomier")
    again: list[int] = []
    train(run_file(tiny, targets, tmp_path / "roomier"), ["dpt"], AtEachStep(lambda _, step: again.append(step)))
    assert again[0] == 3
    assert weights(tmp_path / "roomier", "dpt") == weights(undisturbed, "dpt")


def test_only_the_newest_checkpoints_are_kept(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    settings = ("train.checkpoint.every=1", "train.checkpoint.keep=2")
    train(run_file(tiny, targets, tmp_path / "run", *settings), ["dpt"])
    left = sorted(path.name for path in (tmp_path / "run/dpt/checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000005"]


def test_a_run_that_must_be_new_is_refused_where_a_stage_is_already(
    tiny: TinyWorld, targets: Path, undisturbed: Path
) -> None:
    before = tree(undisturbed)
    with pytest.raises(UserError, match="holds dpt already; name a new --output"):
        train(run_file(tiny, targets, undisturbed), STAGES, resume=False)
    assert tree(undisturbed) == before


def test_activations_that_are_computed_again_change_no_weight(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(run_file(tiny, targets, tmp_path / "run", "train.parallel.activation_checkpointing=true"), STAGES)
    assert_same_students(tmp_path / "run", undisturbed)


def test_mixed_precision_trains_in_float32_and_leaves_a_float32_student_near_the_others(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(run_file(tiny, targets, tmp_path / "run", "train.parallel.precision=bf16"), ["dpt", "dft"])
    lines, wanted = (
        [json.loads(line)["loss"] for line in (folder / "dft/metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", undisturbed)
    )
    assert lines != wanted
    assert lines == pytest.approx(wanted, rel=2e-2)
    config = json.loads((tmp_path / "run/dft/student/config.json").read_text())
    assert config["dtype"] == "float32"


def test_metrics_go_to_weights_and_biases_where_asked(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(run_file(tiny, targets, tmp_path / "run", "train.logging.trackers=[wandb]", "train.dpt.max_steps=2"), ["dpt"])
    assert list((tmp_path / "run/dpt/wandb").glob("offline-run-*/run-*.wandb"))
    assert not (tmp_path / "run/dpt/tensorboard").exists()


class Launched:
    """`train-student` in a process of its own or several, and how far it is."""

    def __init__(self, launcher: list[str], tiny: TinyWorld, targets: Path, output: Path, *settings: str) -> None:
        places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm, "--output", output)
        words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        self.said, self.output = output.with_suffix(".txt"), output
        with self.said.open("wb") as file:
            self.process = subprocess.Popen(
                [*launcher, "train-student", *map(str, places), *words],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )

    def wait_for_dft(self, steps: int = 1) -> None:
        """Until so many of its steps are done."""
        metrics = self.output / "dft/metrics.jsonl"
        assert runs_until(self.process, lambda: metrics.is_file() and metrics.read_text().count("\n") >= steps)

    def finish(self) -> None:
        assert self.process.wait(PATIENCE_S) == 0, self.said.read_text()


# Dropout draws on each rank for itself; long enough for a signal to come before its end.
TOGETHER = ("train.lora.dropout=0.0", "train.dft={batch_size: 8, epochs: 8, learning_rate: 1.0e-3}")


@pytest.fixture(scope="module")
def undisturbed_in_two(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes in one go."""
    output = tmp_path_factory.mktemp("undisturbed-in-two") / "run"
    Launched(TORCHRUN, tiny, targets, output, *TOGETHER).finish()
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passed_on", "resumed_by"),
    [(False, TORCHRUN), (True, ONE)],
    ids=["to-the-launcher-resumed-by-two", "to-all-and-passed-on-resumed-by-one"],
)
def test_sigterm_saves_in_all_processes_of_torchrun_also_when_it_comes_twice(
    passed_on: bool, resumed_by: list[str], tiny: TinyWorld, targets: Path, undisturbed_in_two: Path, tmp_path: Path
) -> None:
    launched = Launched(TORCHRUN, tiny, targets, tmp_path / "run", *TOGETHER)
    launched.wait_for_dft()
    if passed_on:
        for pid in descendants(launched.process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    launched.process.send_signal(signal.SIGTERM)
    launched.process.wait(PATIENCE_S)
    assert launched.said.read_text().count("which is saved; run the same command again") == 2
    assert list((tmp_path / "run/dft/checkpoints").iterdir())
    assert not (tmp_path / "run/dft/student").exists()
    Launched(resumed_by, tiny, targets, tmp_path / "run", *TOGETHER).finish()
    assert_same_training(tmp_path / "run", undisturbed_in_two)
    if resumed_by == TORCHRUN:
        assert_same_students(tmp_path / "run", undisturbed_in_two)


@pytest.mark.slow
def test_a_run_with_loader_processes_that_is_killed_leaves_none_and_goes_on_to_the_same_weights(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    launched = Launched(ONE, tiny, targets, tmp_path / "run", "train.loader.num_workers=1")
    launched.wait_for_dft(steps=3)
    children = descendants(launched.process.pid)
    # Loaders are children of the server that they are copies of.
    loaders = [pid for child in children for pid in descendants(child)]
    launched.process.kill()
    assert launched.process.wait(PATIENCE_S) == -signal.SIGKILL
    left = [pid for pid in children if not wait_until_dead(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert loaders
    assert not left
    assert not (tmp_path / "run/dft/student").exists()
    Launched(ONE, tiny, targets, tmp_path / "run", "train.loader.num_workers=1").finish()
    assert_same_students(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_the_driver_saves_in_the_processes_of_a_ray_cluster(
    tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    pytest.importorskip("pandas", reason="the extra ray-train is not installed")
    settings = (
        f"train.cluster.ray_address={ray_address}",
        "train.cluster.workers=2",
        "train.dft={batch_size: 8, epochs: 400}",
    )
    launched = Launched(ONE, tiny, targets, tmp_path / "run", *settings)
    launched.wait_for_dft()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.process.wait(PATIENCE_S) == SAVED_EXIT_CODE, launched.said.read_text()
    assert "which is saved; run the same command again" in launched.said.read_text()
    assert list((tmp_path / "run/dft/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_ends_the_command_with_a_code_of_its_own_after_a_checkpoint(
    num_workers: int, tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    settings = f"train.loader.num_workers={num_workers}"
    launched = Launched(ONE, tiny, targets, tmp_path / "run", settings)
    launched.wait_for_dft()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.process.wait(PATIENCE_S) == SAVED_EXIT_CODE
    assert "which is saved; run the same command again" in launched.said.read_text()
    assert "Traceback" not in launched.said.read_text()
    Launched(ONE, tiny, targets, tmp_path / "run", settings).finish()
    assert_same_students(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_each_stage_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_run(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    tally = kill_stages(tiny, targets, undisturbed, tmp_path, seed=3, num_kills=4)
    assert tally.kills == dict.fromkeys(STAGES, 4)
    assert tally.came_through >= len(STAGES)
