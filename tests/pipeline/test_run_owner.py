"""Commands that make one output folder at the same moment: one makes it, the others say who does."""

from pathlib import Path

import pytest
import yaml

from pipeline.cli.options import save
from pipeline.run_file import load_run_file
from pipeline.sweep import in_turn, run_sweep
from pipeline.sweep_file import CompareConfig, Sweep, load_sweep
from pipeline.training import train
from stages.samples.pack import pack_samples
from stages.student.run_folder import STAGE_FILE, StageDescription, StageFolder
from storage.errors import UserError
from storage.stores import LocalStore, local
from storage.stores.folder_owner import LOCK_FILE, FolderInUse
from tests.conftest import TinyWorld
from tests.pipeline.processes import start_cdp, tree
from tests.pipeline.runs import SETTINGS, run_file
from tests.processes import PATIENCE_S, kill_when
from tests.storage.stores.test_folder_owner import holder_of


def test_a_run_folder_that_another_process_owns_is_refused_and_nothing_in_it_changes(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with holder_of(output) as owner:
        before = tree(tmp_path)
        with pytest.raises(FolderInUse, match=f"process {owner.pid} "):
            train(run_file(tiny, targets, output), ["dpt"])
        assert tree(tmp_path) == before


def test_a_sweep_and_a_packing_refuse_a_folder_that_another_process_owns(tiny: TinyWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with holder_of(output) as owner:
        before = tree(tmp_path)
        sweep = Sweep(output, {"a": load_run_file(None, [], {})}, CompareConfig())
        with pytest.raises(FolderInUse, match=f"process {owner.pid} "):
            run_sweep(sweep, in_turn(sweep, lambda *_: []))
        with pytest.raises(FolderInUse, match=f"process {owner.pid} "):
            pack_samples(tiny.data, tiny.images, output)
        assert tree(tmp_path) == before


def test_no_student_of_a_sweep_is_named_as_the_file_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"students": {LOCK_FILE: {}}}))
    with pytest.raises(UserError, match="take another"):
        load_sweep(tmp_path / "sweep.yaml", None, [], {"output": str(tmp_path / "out")})


def test_of_two_runs_that_begin_one_stage_the_first_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StageFolder(tmp_path / "dpt")
    data = {"stage": "dpt", "decoder": "d" * 64, "starts_from": "decoder"}
    folder.begin(StageDescription(data, {"seed": 1}))
    folder.begin(StageDescription(data, {"seed": 2}))
    begun = folder.begun_with()
    assert begun is not None
    assert begun.settings == {"seed": 1}

    def refuse(*_: object) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(local.os, "link", refuse)
    StageFolder(tmp_path / "dft").begin(StageDescription({"stage": "dft"}, {"seed": 3}))
    assert (tmp_path / "dft" / STAGE_FILE).is_file()


def test_a_new_checkpoint_folder_never_replaces_one_that_came_meanwhile(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("first", "second"):
        staging = store.staging("out")
        (staging / "file").write_text(name)
        if name == "first":
            store.put_tree(staging, "out", replace=False)
            continue
        with pytest.raises(UserError, match="holds something already"):
            store.put_tree(staging, "out", replace=False)
    assert (tmp_path / "out/file").read_text() == "first"


def test_a_report_is_replaced_whole_and_a_link_to_one_stays_a_link(tmp_path: Path) -> None:
    report, link = tmp_path / "in/report.json", tmp_path / "link.json"
    save(report, "old")
    link.symlink_to(report)
    inode = report.stat().st_ino
    save(link, "new")
    assert link.is_symlink()
    assert report.read_text() == "new"
    assert report.stat().st_ino != inode
    save(Path("/dev/null"), "not replaced")
    assert Path("/dev/null").is_char_device()


@pytest.mark.slow
def test_of_two_commands_with_other_settings_at_one_moment_exactly_one_trains_also_after_a_kill(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    output, errors = tmp_path / "run", [tmp_path / f"{seed}.err" for seed in (1, 2)]
    places = {"samples": tiny.samples, "targets": targets, "student": tiny.student_lm, "output": output}
    flags = [part for name, place in places.items() for part in (f"--{name}", place)]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]

    def command(seed: int) -> list[object]:
        return ["train-student", *flags, *settings, "--stage", "dpt", "--set", f"train.seed={seed}"]

    commands = [start_cdp(*command(seed), err=error) for seed, error in zip((1, 2), errors, strict=True)]
    codes = [process.wait(PATIENCE_S) for process in commands]
    assert sorted(codes) == [0, 2], [error.read_text() for error in errors]
    refusal = errors[codes.index(2)].read_text()
    # The second may be so much slower that the first has ended.
    assert "is in use: process" in refusal or "seed" in refusal
    winner = codes.index(0) + 1
    assert yaml.safe_load((output / "run.yaml").read_text())["train"]["seed"] == winner
    begun = StageFolder(output / "dpt").begun_with()
    assert begun is not None
    assert begun.settings["seed"] == winner
    assert not (output / LOCK_FILE).exists()

    again = tmp_path / "again"
    longer = [*command(1)[:-2], "--set", "train.dpt.max_steps=500", "--output", again]
    checkpoints = again / "dpt/checkpoints"
    assert kill_when(start_cdp(*longer), lambda: any(checkpoints.glob("step-????????")))
    assert (again / LOCK_FILE).exists()
    resumed = start_cdp(*longer)
    kill_when(resumed, lambda: len((again / "provenance.jsonl").read_text().splitlines()) == 2)
    assert len((again / "provenance.jsonl").read_text().splitlines()) == 2
