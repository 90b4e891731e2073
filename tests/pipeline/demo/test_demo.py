"""The demo in miniature, and that the README shows what a real one measured."""

import json
import os
import re
from pathlib import Path

import pytest

from pipeline.demo.recorded import RecordedRuns, recorded_table
from pipeline.demo.report import DemoConfig, DemoSettings
from pipeline.demo.run import run_demo
from pipeline.ui.tables import markdown_table
from storage.errors import StoreUnavailable, UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_demo_runs_resumes_and_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DemoConfig(num_images=40, num_pairs=5, steps=3, loop_steps=2)
    report = run_demo(tmp_path / "demo", config)
    assert set(report.students) == {"sft", "logits", "compodistill"}
    assert report.target_bytes > 0
    for student in report.students.values():
        assert set(student.evaluation.metrics) == set(report.teacher.metrics)
        assert 0 < student.similarity <= 1
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["config"]["num_images"] == 40
    # Losses from the store are those with the teacher in the loop, and the teacher was gone before students trained.
    assert report.loop.steps == 2
    assert max(report.loop.largest_difference.values()) < 1e-3
    assert set(report.loop.step_s) == {"sft", "compodistill", "teacher in the loop"}
    assert not (tmp_path / "demo" / "teacher-checkpoint").exists()
    (shown,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "demo" / "report.html").read_text())
    for sample in json.loads(shown):
        assert [panel["name"] for panel in sample["panels"]] == ["teacher", *report.students]
        assert all(panel["words"] for panel in sample["panels"])

    again = run_demo(tmp_path / "demo", config)
    assert {name: s.evaluation.main for name, s in again.students.items()} == {
        name: s.evaluation.main for name, s in report.students.items()
    }
    with pytest.raises(UserError, match="num_images"):
        run_demo(tmp_path / "demo", config.model_copy(update={"num_images": 41}))

    # The table does not go with a report that cannot be saved.
    (tmp_path / "demo" / "report.json").unlink()
    (tmp_path / "demo" / "report.json").mkdir()
    capsys.readouterr()
    with pytest.raises(IsADirectoryError):
        run_demo(tmp_path / "demo", config)
    assert "attention similarity" in capsys.readouterr().out


def test_a_disk_that_fills_is_one_error_that_names_it(small_disk: Path) -> None:
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - 100_000))
    with pytest.raises(
        StoreUnavailable, match=rf"^{small_disk}/demo.*: No space left on device; free some space there"
    ):
        run_demo(small_disk / "demo", DemoConfig(num_images=40, num_pairs=5, steps=3))


def test_the_readmes_table_and_sentences_are_those_of_the_recorded_runs() -> None:
    recorded = RecordedRuns.read()
    assert recorded is not None
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(markdown_table(recorded_table(recorded)).splitlines()[2:]) in readme
    said = " ".join(readme.split())
    gain = recorded.gains["logits - sft"]
    assert f"{gain.mean:.1f} points ({gain.interval('.1f')})" in said
    lost = [f"{recorded.held_out_lm[name].mean:.2f}" for name in ("sft", "logits")]
    assert f"held-out answers cost it {lost[0]} nats a token, `logits` {lost[1]}" in said
    gain = recorded.gains["compodistill - logits"]
    assert f"{gain.mean:.1f} points ({gain.interval('.1f')})" in said
    assert f"within {max(recorded.largest_difference.values()):.0e}" in said
    stored, loop = (recorded.step_ratio[name] for name in ("compodistill", "teacher in the loop"))
    assert f"{stored:.2f} times the time of a step of `sft`, with the teacher in the loop {loop:.2f} times" in said


def test_the_recorded_runs_are_of_the_demos_own_settings() -> None:
    recorded = RecordedRuns.read()
    assert recorded is not None
    assert recorded.settings == DemoSettings()
    assert len(recorded.seeds) >= 5
