"""Whole pages of real tiny runs: what they say agrees with what was measured, and each page is drawn."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.attention_comparison import compare_with_targets, first_samples, open_student
from pipeline.cli.app import app
from pipeline.report.build import ReportInputs, attention_page, build_page
from pipeline.report.gallery import MOST_WORDS, SIMILARITY_SAMPLES, make_gallery
from pipeline.report.page import TEACHER
from pipeline.training import train
from pipeline.ui.report.render import render_page
from pipeline.ui.tables import ReportTable
from stages.evaluation.attention.received import sample_attention
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.conftest import TinyWorld
from tests.pipeline.report.test_suites import make_result
from tests.pipeline.runs import run_file


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_gallery_shows_what_each_student_and_the_teachers_maps_attend_to(
    undisturbed: Path, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run", "train.matching.student_layers=[0, 1, 3]", "train.dft.max_steps=1")
    train(run, ["dft"])
    places = str(tiny.samples), str(targets)
    models = {"first": str(undisturbed), "second": str(tmp_path / "run")}
    gallery = make_gallery(models, places, 3, teacher=str(tiny.teacher))
    assert len(gallery.samples) == 3
    assert len(set(gallery.images)) == 3
    store = TargetStore.open(targets)
    opened = open_student(str(undisturbed), store)
    by_key = {one.key: one for batch in first_samples(places[0], store, 24) for one in batch}
    for sample in gallery.samples:
        assert [panel.name for panel in sample.panels] == [TEACHER, "first", f"{TEACHER}, as second learned", "second"]
        (seen,) = sample_attention(opened.student, opened.collator([by_key[sample.key]]), opened.matching)
        assert seen is not None
        teacher, first, again, second = sample.panels
        np.testing.assert_array_equal(teacher.pooled_WN, seen.teacher_WN.numpy())
        np.testing.assert_array_equal(first.pooled_WN, seen.student_WN.numpy())
        np.testing.assert_array_equal(first.with_sinks_WN, seen.student_with_sinks_WN.numpy())
        assert len(second.layers) == len(again.layers) == 3
        assert second.layers == ("layer 0", "layer 1", "layer 3")
        assert 0 < len(sample.words) <= MOST_WORDS
        assert all(word in sample.answer for word in sample.words[:1])
        for panel in sample.panels:
            assert panel.words_WQN is not None
            assert panel.words_WQN.shape == (len(panel.layers), len(sample.words), len(sample.boxes_N4))
    assert gallery.similarity["first"] == compare_with_targets(str(undisturbed), *places, SIMILARITY_SAMPLES)


def test_a_page_says_what_was_measured_and_leaves_out_what_was_not(
    undisturbed: Path, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    page = build_page(ReportInputs([undisturbed]))
    stored = summarize(targets)
    assert page.samples == page.suites == ()
    assert page.similarity is None
    assert {panel.title.split(":")[0] for panel in page.losses} == {"dpt", "dft", "sft"}
    sizes = {bar.name: bar.amount for bar in page.amounts[0].bars}
    assert sizes["all, coded"] == stored.total_bytes
    assert sizes["all, raw"] == stored.raw_square_bytes + stored.raw_logit_bytes
    assert [headline.label for headline in page.headlines] == ["targets", "training"]
    settings = {row[0]: row[-1] for table in page.facts for row in table.rows}
    assert settings["train.dft.max_steps"] == "5"
    html = render_page(page)
    assert "<canvas" not in html
    assert str(targets) in html


def test_a_store_that_is_gone_is_said_and_the_rest_is_shown(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    settings = (tmp_path / "run" / "run.yaml").read_text()
    (tmp_path / "run" / "run.yaml").write_text(re.sub("(?m)^targets: .*$", "targets: /nowhere/targets", settings))
    page = build_page(ReportInputs([tmp_path / "run"]))
    assert page.losses
    assert page.notes[0].startswith("nothing is said of the target store: /nowhere/targets is no target store")


def test_a_run_without_a_finished_stage_shows_its_losses(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    for stage in ("dpt", "dft", "sft"):
        (tmp_path / "run" / stage / "report.json").unlink()
    page = build_page(ReportInputs([tmp_path / "run"]))
    assert page.notes == ("run: no stage is finished yet, so only its losses are shown",)
    assert page.losses
    assert render_page(page)


def test_the_command_writes_one_page_with_accuracy_pictures_and_its_size(
    undisturbed: Path, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    results = make_result(tmp_path / "baseline" / "sugarcrepe", 61.5)
    teacher = make_result(tmp_path / "of teacher" / "sugarcrepe", 90.25)
    html = tmp_path / "new" / "report.html"
    asked: list[Any] = ["report", undisturbed, "--html", html, "--results", results, "--teacher-results", teacher]
    asked += ["--samples", tiny.samples, "--targets", targets, "--pictures", 2]
    done = CliRunner().invoke(app, list(map(str, asked)), catch_exceptions=False)
    assert done.exit_code == 0
    text = html.read_text()
    assert "61.5 [56.5, 66.5]" in text
    assert "90.2 [85.2, 95.2]" in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    assert len(json.loads(data)) == 2
    assert json.loads(data)[0]["panels"][1]["name"] == "run"


MISTAKES = {
    "--samples {samples}": "--samples and --targets belong together",
    "--teacher {teacher}": "--teacher shows its attention on pictures, which need --samples and --targets",
    "--results {samples}": "holds no result of `cdp evaluate`",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_said(flags: str, undisturbed: Path, tiny: TinyWorld, tmp_path: Path) -> None:
    given = flags.format(samples=tiny.samples, teacher=tiny.teacher).split()
    done = CliRunner().invoke(app, ["report", str(undisturbed), "--html", str(tmp_path / "r.html"), *given])
    assert MISTAKES[flags] in str(done.exception)
    assert not (tmp_path / "r.html").exists()


def test_the_page_of_students_alone_has_their_attention_and_the_store(
    undisturbed: Path, tiny: TinyWorld, targets: Path
) -> None:
    places = str(tiny.samples), str(targets)
    measured = compare_with_targets(str(undisturbed), *places, 4)
    table = ReportTable("objects", ["layer", "AUC"], [["2", "0.61"]])
    page = attention_page({"student": str(undisturbed)}, places, {"student": measured}, [table], 2)
    assert len(page.samples) == 2
    assert page.similarity is not None
    assert page.similarity.curves[0].y == measured.similarity
    assert [headline.value for headline in page.headlines if headline.label == "attention similarity"] == [
        f"{measured.mean:.3f}"
    ]
    assert [one.title for one in page.facts] == ["objects", "Target store"]
    assert page.facts[0].rows == (("2", "0.61"),)
