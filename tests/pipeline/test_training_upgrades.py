"""A run folder that another version of the project began."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.training import train
from storage.errors import FingerprintMismatch, UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import run_file


@pytest.fixture
def output(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of a run whose first stage is finished."""
    shutil.copytree(undisturbed / "dpt", tmp_path / "run/dpt")
    return tmp_path / "run"


def change(file: Path, changed: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    changed(content)
    file.write_text(json.dumps(content))


def test_a_report_that_does_not_say_how_long_the_first_data_took_is_read(
    tiny: TinyWorld, targets: Path, output: Path
) -> None:
    change(output / "dpt/report.json", lambda report: report.pop("first_batch_s"))
    (report,) = train(run_file(tiny, targets, output), ["dpt"])
    assert (report.steps, report.first_batch_s) == (5, 0.0)


def test_a_report_of_a_newer_version_is_refused_and_the_stage_can_be_ended_anew_as_the_error_says(
    tiny: TinyWorld, targets: Path, undisturbed: Path, output: Path
) -> None:
    run, report = run_file(tiny, targets, output), output / "dpt/report.json"
    change(report, lambda found: found.update(watts=300))
    with pytest.raises(UserError, match=r"dpt/report.json is not .* \(watts: Extra inputs .*\); .* remove the file"):
        train(run, ["dpt"])
    report.unlink()
    steps: list[object] = []
    train(run, ["dpt"], lambda *step: steps.append(step))
    assert steps == []
    assert tree(output, "dpt/student") == tree(undisturbed, "dpt/student")


@pytest.mark.parametrize(
    ("settings", "forget"),
    [
        ([], lambda begun: begun["settings"].pop("max_grad_norm")),
        ([], lambda begun: begun.pop("dpt.kd_divergence")),
        (["train.lora.dropout=0.0"], lambda begun: begun["settings"]["lora"].pop("dropout")),
    ],
    ids=["of the run", "of the stage", "in a section"],
)
def test_a_setting_that_the_folder_does_not_know_counts_as_its_default(
    settings: list[str], forget: Callable[[dict[str, Any]], object], tiny: TinyWorld, targets: Path, output: Path
) -> None:
    change(output / "dpt/stage.json", forget)
    (report,) = train(run_file(tiny, targets, output, *settings), ["dpt"])
    assert report.steps == 5


@pytest.mark.parametrize(
    ("settings", "forget", "named"),
    [
        (["train.max_grad_norm=0.5"], lambda begun: begun["settings"].pop("max_grad_norm"), "max_grad_norm"),
        ([], lambda begun: begun["settings"]["lora"].pop("dropout"), "lora"),
        ([], lambda begun: begun.pop("num_samples"), "num_samples"),
    ],
    ids=["a setting", "in a section", "what it was trained on"],
)
def test_what_the_folder_does_not_know_is_refused_where_it_is_no_default(
    settings: list[str],
    forget: Callable[[dict[str, Any]], object],
    named: str,
    tiny: TinyWorld,
    targets: Path,
    output: Path,
) -> None:
    change(output / "dpt/stage.json", forget)
    with pytest.raises(FingerprintMismatch, match=rf"differs in: {named}\)"):
        train(run_file(tiny, targets, output, *settings), ["dpt"])
