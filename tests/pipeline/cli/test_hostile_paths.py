"""Paths that no file can have, given to commands: one message that names them, before any work is done."""

import json
import shutil
from pathlib import Path

import pytest

from stages.student.run_folder import StageDescription, StageFolder
from storage.errors import MAX_MESSAGE_CHARS
from tests.checkpoints import make_tiny_llava
from tests.pipeline.processes import run_here

LONG = "x" * 300
GOLDEN = Path(__file__).parents[2] / "golden" / "released_layout_teacher"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file, its images, a checkpoint, a folder and a file."""
    folder = tmp_path_factory.mktemp("paths")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (folder / "data.json").write_text(json.dumps([{"id": LONG * 30, "conversations": turns}]))
    (folder / "images").mkdir()
    make_tiny_llava(folder / "llava")
    shutil.copytree(GOLDEN, folder / "released")
    StageFolder(folder / "run" / "dft").begin(StageDescription({}, {}))
    return folder


COMMANDS = [
    "pack-samples {bad} images out",
    "pack-samples data.json {bad} out",
    "pack-samples data.json images {bad}",
    "convert-checkpoint {bad} out",
    "convert-checkpoint released {bad}",
    "export {bad} out",
    "export llava {bad}",
    "evaluate {bad} --suite sugarcrepe --data images --output out",
    "evaluate llava --suite sugarcrepe --data {bad} --output out",
    "evaluate llava --suite sugarcrepe --data images --output out --report {bad}",
    "estimate --config-only --teacher llava --report {bad}",
    "estimate --config {bad}",
    "compare-attention llava --samples s --targets t --html {bad}",
    "report {bad} --html page.html",
    "report run --html page.html --results {bad}",
    "chat llava {bad} question",
    "inspect {bad}",
    "verify {bad}",
    "train-student --sweep {bad}",
    "train-student --samples s --targets t --student x --output {bad}",
    "demo --output {bad}",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", [LONG, "data.json/below", "\udcff" * 20, "a/" * 2000, "/proc/none/below"])
def test_a_path_that_cannot_be_is_one_message(
    command: str, bad: str, places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    before = sorted(places.iterdir())
    ended = run_here(*(word.format(bad=bad) for word in command.split()), monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2, ended
    assert ended.err.count("error:") == 1
    assert len(ended.err) < MAX_MESSAGE_CHARS + 100
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize("option", ["--report", "--html"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("images", "images is a folder, expected a file to save a report in"),
        ("file/x", "file/x leads through file, which is a file; name a file in a folder"),
        ("file/y/x", "file/y/x leads through file, which is a file; name a file in a folder"),
    ],
)
def test_a_report_that_cannot_be_saved_is_refused_before_the_work(
    option: str,
    path: str,
    message: str,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(places)
    Path("file").touch()
    command = ("compare-attention", "nowhere", "--samples", "s", "--targets", "t", option, path)
    ended = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_a_path_that_is_not_utf8_is_refused_before_the_work(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    for command in (
        ("export", "b\udcff", "out"),
        ("export", "llava", "b\udcff"),
        ("pack-samples", "data.json", "images", "b\udcff"),
        ("inspect", "b\udcff"),
        ("train-student", "--samples=s", "--targets=t", "--student=x", "--output=b\udcff"),
        ("extract-teacher", "--teacher=llava", "--samples=s", "--targets=b\udcff"),
        ("demo", "--output=b\udcff"),
    ):
        ended = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
        assert ended.code == 2
        assert "b\\udcff is not UTF-8" in ended.err
