"""Mistakes are said before a large library is loaded, and before any work is done; results are not lost with a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here

PAIRS = "--suite sugarcrepe --data {pairs} --output {new}"
TRAIN = "train-student --samples {samples} --targets {targets} --student {lm} --output"
EXTRACT = "extract-teacher --teacher {teacher} --samples {samples} --targets {new}"

SWAPPED = "are samples and targets swapped?"

MISTAKES = {
    f"{TRAIN} {{new}} --set lr=1": "lr: there is no such setting",
    f"{EXTRACT} --config {{data}}/data.json": "holds a list, expected sections",
    "config train.lr": "did you mean train.dpt.learning_rate or train.dft.lea",
    f"{EXTRACT} --set teacher.layers=[7,8]": "layers [7, 8] are not consecutive layers of a decoder with 8",
    f"{EXTRACT} --set teacher.num_matched=9": "9 matched layers need at least as many captured teacher layers",
    # Samples and targets swapped, in every command that takes both.
    "train-student --samples {targets} --targets {samples} --student {lm} --output {new}": SWAPPED,
    "extract-teacher --teacher {teacher} --samples {targets} --targets {new}": SWAPPED,
    "extract-teacher --teacher {teacher} --samples {samples} --targets {samples}": SWAPPED,
    "compare-attention {teacher} --samples {targets} --targets {samples}": SWAPPED,
    "estimate --teacher {teacher} --samples {targets}": SWAPPED,
    "estimate --teacher {teacher} --config-only": "give --samples, or --set estimate.samples=NUMBER",
    "inspect {samples}": SWAPPED,
    "verify {samples} --samples {targets}": SWAPPED,
    # Something else than what is asked for.
    "train-student --samples {teacher} --targets {targets} --student {lm} --output {new}": "but a model's che",
    "train-student --samples {samples} --targets {new} --student {lm} --output {new}": "nothing is there; check",
    "train-student --samples {samples} --targets {targets} --student {samples} --output {new}": "found a sample set",
    "extract-teacher --teacher {teacher} --samples {data}/data.json --targets {new}": "but a file; name",
    "extract-teacher --teacher {data}/data.json --samples {samples} --targets {new}": "is a file, expected the folder",
    "extract-teacher --teacher {teacher} --samples {samples} --targets {lm}": "is a model's checkpoint, expected",
    "extract-teacher --teacher {teacher} --samples {samples} --targets {data}/data.json": "is a file; name a folder",
    f"{TRAIN} {{targets}}": "is a target store, expected a training run or a new folder",
    "export {samples} {new}": "found a sample set",
    "export {lm} {lm}": "holds something already",
    "export {lm} {new} --evaluation {data}/data.json": "is no result of `cdp evaluate`",
    "convert-checkpoint {targets} {new}": "found a target store",
    "evaluate {lm} --suite sugarcrepe --data {data}/data.json --output {new}": "is not a folder",
    "chat {teacher} {new}/none.png question": "no image at",
    "demo --output {data}/data.json": "is a file; name a folder",
    # Where nothing can be written, or what lies on another machine.
    f"{TRAIN} /proc/none": "nothing can be written in /proc",
    f"{TRAIN} s3://bucket/run": "s3://bucket/run is a URL, expected a path of this machine",
    "estimate --teacher {teacher} --samples {samples} --report /proc/none/x.json": "nothing can be written in /proc",
    "evaluate {lm} " + PAIRS + " --report /proc/x.json": "nothing can be written in /proc",
    "compare-attention {lm} --samples s --targets t --html {data}/data.json/x.html": "leads through a file",
    "export {lm} /proc/none": "nothing can be written in /proc",
    "pack-samples https://host/data.json {data} {new}": "https://host/data.json is a URL",
    "pack-samples {data}/data.json {data}/images /proc/none": "nothing can be written in /proc",
    "demo --output /proc/none": "nothing can be written in /proc",
}

ALL = """
import json, sys
from pipeline.cli.app import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["cdp", *line.split()]
    print(f"# {line}", file=sys.stderr)
    try:
        main()
    except SystemExit as ended:
        print(ended.code, sorted({"ray", "torch", "transformers", "zarr"} & set(sys.modules)))
"""


def test_mistakes_are_said_before_a_large_library_is_loaded(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    names = {**vars(tiny), "lm": tiny.student_lm, "data": tiny.data.parent, "targets": targets, "new": tmp_path / "new"}
    commands = [command.format(**names) for command in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ALL], input="\n".join(commands), capture_output=True, text=True, check=True
    )
    said = dict(zip(commands, done.stderr.split("# ")[1:], strict=True))
    for command, message in zip(commands, MISTAKES.values(), strict=True):
        assert message in said[command], said[command]
        assert said[command].count("error: ") == 1
    # All in one process: what one command loads, the next ones would show as well.
    assert dict(zip(commands, done.stdout.splitlines(), strict=True)) == dict.fromkeys(commands, "2 []")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_called_that(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pipeline.cli", "export", "somebody/model", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert (
        "no checkpoint at somebody/model: there is no such folder here, and the model hub at http://127" in done.stderr
    )
    assert "does not answer" in done.stderr
    here = subprocess.run([*command[:-2], "no/such/folder", command[-1]], capture_output=True, text=True, check=False)
    assert "there is no such folder here, and it is no model id either; check the path" in here.stderr


@pytest.mark.parametrize("folder", ["", "new/"])
def test_a_place_that_can_be_written_is_left_as_it_was(folder: str, tmp_path: Path) -> None:
    from storage.writable import check_writable

    check_writable(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "table"),
    [
        ("estimate --teacher {teacher} --config-only --set estimate.samples=665000", "computed from configs alone"),
        ("evaluate {teacher} --suite sugarcrepe --data {pairs} --limit 1 --output out", "on sugarcrepe"),
    ],
)
def test_the_table_is_printed_before_the_report_is_saved(
    command: str, table: str, tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(**vars(tiny)) for word in command.split()]
    ended = run_here(*words, "--report", "/dev/full", monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert table in " ".join(ended.out.split())
    assert "error: /dev/full: No space left on device" in ended.err
