"""The fuzzer finds what is wrong, and nothing is wrong with the product for a minute of it."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from storage.errors import CorruptData
from storage.regular_files import read_regular
from tests.fuzz.__main__ import replay
from tests.fuzz.attempt import Mutant, Target, attempt
from tests.fuzz.fuzz import fuzz
from tests.fuzz.runs import written
from tests.fuzz.targets import TARGETS

SECONDS = 60.0
SEED = 1


def make(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.json").write_text("[1]")


def mutants(_: Path) -> st.SearchStrategy[Mutant]:
    return written("a.json", st.sampled_from([b"[2]", b"[", b"[1]"]))


def careful(folder: Path) -> object:
    try:
        return json.loads(read_regular(folder / "a.json"))
    except ValueError as error:
        raise CorruptData(f"{folder / 'a.json'} is no JSON") from error


def careless(folder: Path) -> None:
    json.loads(read_regular(folder / "a.json"))


def endless(_: Path) -> None:
    while True:
        pass


def greedy(_: Path) -> None:
    bytearray(2**34)


def nameless(_: Path) -> None:
    raise CorruptData("something is wrong")


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (careless, "JSONDecodeError in outside"),
        (greedy, "MemoryError in outside"),
        (endless, "TooLong in outside"),
        (nameless, "a message without the place: something is wrong"),
    ],
)
def test_a_reader_that_breaks_the_rule_is_found(
    read: object, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.attempt.LIMIT_S", 0.2)
    make(tmp_path / "a")
    (tmp_path / "a/a.json").write_text("[")
    _, fault = attempt(Target("t", make, read, mutants), tmp_path / "a", [1])  # type: ignore[arg-type]
    assert fault is not None
    assert fault.kind == kind


def test_other_values_that_are_accepted_are_a_fault_that_is_kept_and_can_be_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target("t", make, careful, mutants)
    outcome = fuzz(target, 0.5, SEED, tmp_path, lambda _: None)
    assert outcome.faults.keys() == {"accepted, with other values"}
    assert 0 < outcome.num_accepted < outcome.num_attempts
    (folder,) = outcome.faults.values()
    assert (folder / "input/a.json").read_bytes() == b"[2]"
    assert f'--target "t" --replay {folder / "input"}' in (folder / "fault.txt").read_text()
    capsys.readouterr()
    assert replay(target, folder / "input") == 1
    assert capsys.readouterr().out.startswith("accepted, with other values")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_a_stranger_gives_is_read_or_refused_by_a_named_error(target: Target, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    outcome = fuzz(target, SECONDS / len(TARGETS), SEED, tmp_path, lambda _: None)
    print(f"{outcome.num_attempts} attempts, {outcome.num_accepted} accepted")
    assert outcome.faults == {}
    assert outcome.num_attempts > 0
