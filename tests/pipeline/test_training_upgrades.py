"""A run folder that another version of the project began."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.training import train
from stages.student.layer_matching import MatchingConfig
from stages.student.run_folder import StageFolder
from storage.errors import FingerprintMismatch, UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import run_file
from tests.pipeline.steps import AtEachStep


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
    train(run, ["dpt"], AtEachStep(lambda *step: steps.append(step)))
    assert steps == []
    assert tree(output, "dpt/student") == tree(undisturbed, "dpt/student")


def as_before_there_were_sections(begun: dict[str, Any]) -> None:
    """What the version wrote that had all settings of training side by side, and those of the stage beside them."""
    now = begun["settings"]
    begun |= {name: value for name, value in now.items() if name.startswith("dpt.")}
    begun["settings"] = {
        "adapter": now["vision"],
        "own_adapter": now["projector"],
        "lora": {"rank": now["lora.rank"], "alpha": now["lora.alpha"], "dropout": now["lora.dropout"]},
        "student_layers": now["matching.student_layers"],
        "num_matched": now["matching.num_matched"],
        "matching": now["matching.kind"],
        "layers": now["matching.span"],
        "max_grad_norm": now["max_grad_norm"],
        "precision": now["parallel.precision"],
        "seed": now["seed"],
        "shuffle_shards": now["data.shuffle_shards"],
        "max_samples": now["data.max_samples"],
    }


def test_a_run_folder_of_the_version_without_sections_goes_on(tiny: TinyWorld, targets: Path, output: Path) -> None:
    begun = output / "dpt/stage.json"
    names = set(json.loads(begun.read_text())["settings"])
    change(begun, as_before_there_were_sections)
    (report,) = train(run_file(tiny, targets, output), ["dpt"])
    assert report.steps == 5
    found = set(StageFolder(output / "dpt").begun_with().settings)  # type: ignore[union-attr]
    assert found == {name for name in names if not name.startswith("validation.")} - {"positions"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("train.data.shuffle_shards=3", "data.shuffle_shards"),
        ("train.parallel.precision=bf16", "parallel.precision"),
        ("train.vision=own", "vision"),
        ("train.dpt.kd_weight=0.5", "dpt.kd_weight"),
    ],
)
def test_other_settings_than_those_of_an_earlier_version_are_refused_by_the_names_of_today(
    changed: str, named: str, tiny: TinyWorld, targets: Path, output: Path
) -> None:
    change(output / "dpt/stage.json", as_before_there_were_sections)
    with pytest.raises(FingerprintMismatch, match=rf"differs in: {named}\)"):
        train(run_file(tiny, targets, output, changed), ["dpt"])


def test_which_layers_an_earlier_version_matched_is_known(output: Path) -> None:
    begun = output / "dpt/stage.json"
    change(begun, as_before_there_were_sections)
    change(begun, lambda found: found["settings"].update(matching="one_to_one", layers="late", student_layers=[3]))
    expected = MatchingConfig(kind="one_to_one", span="late", student_layers=(3,))
    assert StageFolder(output / "dpt").matching() == expected


@pytest.mark.parametrize(
    ("settings", "forget"),
    [
        ([], lambda begun: begun["settings"].pop("max_grad_norm")),
        ([], lambda begun: begun["settings"].pop("dpt.kd_divergence")),
        (["train.lora.dropout=0.0"], lambda begun: begun["settings"].pop("lora.dropout")),
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
        ([], lambda begun: begun["settings"].pop("lora.dropout"), "lora.dropout"),
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
