"""`cdp export` and `cdp chat` on a finished training run."""

import json
import random
import re
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.chat import open_chat
from pipeline.export import _names_of, export
from pipeline.models import load_model
from stages.evaluation.result import Metric, SuiteResult
from stages.student.stage_config import STAGES
from storage.targets.store import TargetStore
from tests.checkpoints import draw_random_image
from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here
from tests.stages.export.gguf_students import make_llava
from tests.suite_runs import suite_run

EVALUATION = SuiteResult(
    run=suite_run(),
    metrics={"swap_obj": {"accuracy": Metric(value=62.5, interval_95=(47.2, 76.1), chance=50.0)}},
    num_items={"swap_obj": 40},
    num_missing=2,
    seconds=1.0,
    items_per_s=40.0,
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    draw_random_image(random.Random(3)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_run_is_exported_with_a_card_of_its_figures(
    undisturbed: Path,
    targets: Path,
    tiny: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "evaluation.json").write_text(EVALUATION.model_dump_json())
    flags = ("--teacher", "some-org/teacher-4b", "--evaluation", tmp_path / "evaluation.json")
    done = run_here("export", undisturbed, tmp_path / "out", *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    assert "modeling_compodistill.py" in done.out
    assert "off at most" in done.out
    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["some-org/teacher-4b"],
        "tags": ["distillation", "compodistill"],
    }
    for stage in STAGES:
        report = json.loads((undisturbed / stage / "report.json").read_text())
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {stage} | {report['samples']:,} |"))
        assert all(f"{loss:.4f}" in row for loss in report["losses"].values())
    assert f"fingerprint of the target store: `{TargetStore.open(targets).manifest.fingerprint.digest}`" in card
    begun = json.loads((undisturbed / "dpt" / "stage.json").read_text())
    assert f"weights that training began from: `{begun['decoder']}`" in card
    assert f"its teacher `some-org/teacher-4b`, begun from `{tiny.student_lm.name}`" in card
    assert "| `learning_rate` | 0.0002 | 0.001 | 0.0002 |" in card
    assert "- `lora.rank`: 4\n- `lora.alpha`: 8\n- `lora.dropout`: 0.1\n" in card
    assert "| swap_obj | 40 | accuracy | 62.5 | 47.2 to 76.1 | 50.0 |" in card
    assert "trust_remote_code=True" in card
    exported = json.loads((tmp_path / "out" / "export.json").read_text())
    assert f"{exported['logit_error']:.2g} at most" in card
    # Folders of this machine are nobody else's business.
    assert not any(str(place) in card for place in (tiny.student_lm, targets, undisturbed))


def test_only_names_that_the_hub_is_known_to_have_are_its_ids(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    document = yaml.safe_load((run / "run.yaml").read_text())
    document["student"], document["teacher"] = "some-org/decoder", {"checkpoint": "models/teacher-4b"}
    (run / "run.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr("pipeline.export.in_hub_cache", lambda name: name == "some-org/decoder")
    names = _names_of(run / "sft" / "student", None)
    assert (names.student, names.teacher) == ("some-org/decoder", "models/teacher-4b")
    assert names.hub_ids == {"some-org/decoder"}
    assert _names_of(run / "sft" / "student", "some-org/teacher").hub_ids == {"some-org/decoder", "some-org/teacher"}
    # A folder of that name is here.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org" / "teacher").mkdir(parents=True)
    assert _names_of(run / "sft" / "student", "some-org/teacher").hub_ids == {"some-org/decoder"}


def test_an_earlier_stage_is_exported_by_its_folder_and_its_card_ends_there(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = run_here("export", undisturbed / "dft", out, "--no-fold", monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    report = json.loads((out / "export.json").read_text())
    assert (report["post_connector"], report["logit_error"], report["source"]) == ("kept", 0, "run/dft/student")
    found, trained = load_file(out / "model.safetensors"), load_file(undisturbed / "dft/student/model.safetensors")
    assert found.keys() == trained.keys()
    assert all(bool((found[name] == trained[name]).all()) for name in found)
    card = (out / "README.md").read_text()
    assert "| dft |" in card
    assert "| sft |" not in card


def test_a_run_is_exported_in_another_precision_with_what_that_changes(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = run_here("export", undisturbed, out, "--dtype", "bfloat16", monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    report = json.loads((out / "export.json").read_text())
    assert (report["dtype"], report["trained_dtype"]) == ("bfloat16", "float32")
    assert 0 < report["rounding_error"] < 0.1 * report["logit_scale"]
    assert f"({report['rounding_error']:.2g} by rounding from float32 alone)" in " ".join(done.out.split())
    trained = (undisturbed / "sft" / "student" / "model.safetensors").stat().st_size
    assert 0.4 < (out / "model.safetensors").stat().st_size / trained < 0.6
    done = run_here("export", undisturbed, tmp_path / "no", "--dtype", "int8", monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("text", "teacher"),
    [
        ("student: some-org/lm\nteacher: {checkpoint: some-org/teacher, of_old: 1}\ngone: 3\n", "some-org/teacher"),
        ("student: [1]\nteacher: 3\n", None),
        ("no: [run file", None),
    ],
)
def test_a_run_file_of_another_version_or_none_at_all_does_not_hinder_an_export(
    text: str, teacher: str | None, undisturbed: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "run" / "dft"
    shutil.copytree(undisturbed / "dft", stage)
    (tmp_path / "run" / "run.yaml").write_text(text)
    export(str(stage), tmp_path / "out", fold=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("its teacher `some-org/teacher`, begun from `some-org/lm`" in card) == (teacher is not None)
    # Two folders above a checkpoint that no run made lies whatever lies there.
    (stage / "stage.json").unlink()
    export(str(stage), tmp_path / "again", fold=False)
    assert "some-org" not in (tmp_path / "again" / "README.md").read_text()


def test_of_a_run_whose_last_stage_is_half_trained_the_command_says_which_student_it_takes_and_warns(
    undisturbed: Path,
    picture: Path,
    tiny: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    suite = ("--suite", "sugarcrepe", "--data", tiny.pairs, "--limit", 1)
    commands: list[tuple[object, ...]] = [
        ("export", run, tmp_path / "out", "--no-fold"),
        ("chat", run, picture, "What?", "--max-new-tokens", 2),
        ("evaluate", run, *suite, "--output", tmp_path / "evaluated"),
    ]
    for finished in (True, False):
        for command in commands:
            done = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
            assert done.code == 0, done.err
            used = run / ("sft" if finished else "dft") / "student"
            assert f"student: {used}, of {used.parent.name}, the last stage that finished" in done.err
            assert ("warning: sft of" in done.err) == (not finished)
        # As after a kill: begun, with checkpoints, without report and student.
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "evaluated")
        (run / "sft" / "report.json").unlink(missing_ok=True)
        shutil.rmtree(run / "sft" / "student", ignore_errors=True)
    done = run_here(
        "chat", run / "dft", picture, "What?", "--max-new-tokens", 2, monkeypatch=monkeypatch, capsys=capsys
    )
    assert "the last stage" not in done.err


def test_an_export_is_evaluated_and_asked_like_the_run(
    undisturbed: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here("export", undisturbed, tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys).code == 0
    model, _ = load_model(str(tmp_path / "out"))
    assert model.config.has_post_connector is False
    answers = [
        run_here("chat", place, picture, "What is it?", "--max-new-tokens", 6, monkeypatch=monkeypatch, capsys=capsys)
        for place in (undisturbed, undisturbed / "sft", tmp_path / "out")
    ]
    assert [done.code for done in answers] == [0, 0, 0]
    assert len({done.out for done in answers}) == 1
    assert answers[0].out.strip()


def test_without_a_question_chat_reads_questions_until_an_empty_line(
    undisturbed: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("What is it?\n<image> <image>\nAnd now?\n\nunread\n"))
    done = run_here("chat", undisturbed, picture, "--max-new-tokens", 4, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    chat = open_chat(str(undisturbed), picture, 4)
    pieces: list[str] = []
    chat.ask("What is it?", pieces.append)
    first, refused = "".join(pieces), "placeholder_without_image: 3 <image> in the human turns, 1 images"
    pieces.clear()
    chat.ask("And now?", pieces.append)
    assert done.out == f"{first}\n{refused}\n{''.join(pieces)}\n"


def test_the_command_writes_gguf_files_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_llava(tmp_path / "student", "qwen3"), tmp_path / "served"
    flags = ("--format", "gguf", "--dtype", "float16")
    done = run_here("export", source, out, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    decoder, vision = "served-F16.gguf", "mmproj-served-F16.gguf"
    assert {path.name for path in out.iterdir()} == {decoder, vision, "README.md", "export.json"}
    assert all(name in done.out for name in (decoder, vision, "qwen2, by llama.cpp's name"))
    assert f"llama-server -m {decoder} --mmproj {vision} --jinja" in (out / "README.md").read_text()
    unfolded = run_here(
        "export", source, tmp_path / "none", "--format", "gguf", "--no-fold", monkeypatch=monkeypatch, capsys=capsys
    )
    assert (unfolded.code, (tmp_path / "none").exists()) == (2, False)
    assert "leave out --no-fold" in unfolded.err


def test_mistakes_are_messages(
    tiny: TinyWorld,
    undisturbed: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "wrong.json").write_text("{}")
    cases = {
        ("chat", undisturbed, tmp_path / "none.png", "What?"): "no image at .*none.png: No such file",
        ("chat", undisturbed, tmp_path, "What?"): "is a folder, expected a regular file",
        ("chat", undisturbed, tmp_path / "text.png", "What?"): "unsupported_image",
        ("chat", tmp_path / "nothing", picture, "What?"): "no checkpoint at .*nothing",
        ("chat", tiny.student_lm, picture, "What?"): "is of type qwen2, which takes no images",
        ("export", undisturbed, tiny.data.parent): "holds something already; name a new folder",
        (
            "export",
            undisturbed,
            tmp_path / "out",
            "--evaluation",
            tmp_path / "wrong.json",
        ): "is no result of `cdp evaluate`",
    }
    for command, message in cases.items():
        done = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
        assert (done.code, done.out) == (2, "")
        assert re.search(message, done.err), done.err
    assert not (tmp_path / "out").exists()
