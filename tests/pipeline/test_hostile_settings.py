"""Run files, `--set` and sweeps of a stranger: refused with a short error, whatever YAML lets them stand for."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.run_file import load_run_file
from pipeline.sweep_file import load_sweep
from storage.errors import UserError

SWEEP = "output: o\nsamples: s\ntargets: t\nstudent: x\n"


def repeated(last: str, first: str, each: str, levels: int = 9) -> str:
    """YAML whose last line stands for 10 ** `levels` values, by aliases of aliases."""
    names = [f"z{level}" for level in range(levels)]
    lines = [f"z0: &z0 {first}"]
    for old, new in pairwise(names):
        lines.append(f"{new}: &{new} {each.replace('OLD', f'*{old}')}")
    return "\n".join([*lines, last.replace("ALL", f"*{names[-1]}")])


SECTIONS = "{" + ", ".join(f"a{number}: 1" for number in range(10)) + "}"
SECTION_OF = "{" + ", ".join(f"b{number}: OLD" for number in range(10)) + "}"
LIST, LIST_OF = "[x, x, x, x, x, x, x, x, x, x]", "[" + ", ".join(["OLD"] * 10) + "]"
MERGED = "{<<: " + LIST_OF + "}"


@pytest.mark.parametrize(
    "text",
    [
        repeated("train: ALL", SECTIONS, SECTION_OF),
        repeated("train: {stages: ALL}", LIST, LIST_OF),
        repeated("teacher: {checkpoint: x, layers: ALL}", LIST, LIST_OF),
        repeated("train: ALL", "{seed: 1}", MERGED),
        "\n".join(f"k{number}: 1" for number in range(11_000)),
    ],
    ids=["sections", "list", "numbers", "merged", "keys"],
)
def test_yaml_that_stands_for_any_number_of_values_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match="stands for more than 10,000 values") as caught:
        load_run_file(tmp_path / "run.yaml", [], {})
    assert time.process_time() - started < 10
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        repeated("students: {a: ALL}", SECTIONS, SECTION_OF),
        repeated("students: ALL", SECTIONS, SECTION_OF),
        repeated("students: {a: {}}\ntrain: ALL", SECTIONS, SECTION_OF),
        repeated("students: {a: {}}\nconfig: ALL", LIST, LIST_OF),
        repeated("students: {a: {}}\ncompare: {pairs: ALL}", LIST, LIST_OF),
    ],
)
def test_a_sweep_is_refused_likewise(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP + text)
    with pytest.raises(UserError, match="stands for more than 10,000 values"):
        load_sweep(tmp_path / "sweep.yaml", None, [], {})


def test_of_thousands_of_unknown_settings_twenty_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("\n".join(f"k{number}: 1" for number in range(3000)))
    with pytest.raises(UserError, match="and 2980 more") as caught:
        load_run_file(tmp_path / "run.yaml", [], {})
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('samples="a\\0b"', "a character that neither text nor a path can have"),
        ('samples="\\ud800"', "a character that neither text nor a path can have"),
        ("train.seed=" + ":".join(["59"] * 9000), "a number of more than 64 bits"),
        ("train.seed=!!python/name:os.system", "is not YAML"),
        ("__class__.__init__=1", "__class__.__init__: there is no such setting"),
        ("train.__dict__=1", "train.__dict__: there is no such setting"),
        ("a" + ".a" * 10_000 + "=1", "a: there is no such setting"),
        ("..=1", "there is no such setting"),
        ("train=&a [*a]", "train: Input should be a valid dictionary"),
        ("train.seed=.nan", "train.seed: "),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run_file(None, [setting], {})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b"], "cannot name a folder"),
        ([".."], "cannot name a folder"),
        (["a\\nb"], "cannot name a folder"),
        (["x" * 101], "cannot name a folder; take up to 100"),
        (["First", "first"], "students First and first differ in case alone"),
    ],
)
def test_students_of_a_sweep_get_folders_of_their_own(tmp_path: Path, names: list[str], message: str) -> None:
    students = "".join(f'  "{name}": {{}}\n' for name in names)
    (tmp_path / "sweep.yaml").write_text(f"{SWEEP}students:\n{students}")
    with pytest.raises(UserError, match=message):
        load_sweep(tmp_path / "sweep.yaml", None, [], {})
