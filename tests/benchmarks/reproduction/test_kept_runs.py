import json
from pathlib import Path

import pytest

from benchmarks.reproduction.kept_runs import kept, with_earlier


def test_a_run_is_made_once_and_says_its_command(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, int]:
        made.append("run")
        return {"steps": 3}

    first = kept(tmp_path / "run.json", {"size": (1, 2)}, "python -m first", make)
    assert kept(tmp_path / "run.json", {"size": (1, 2)}, "python -m second", make) == first
    assert (first["command"], first["steps"], made) == ("python -m first", 3, ["run"])


def test_a_run_of_other_settings_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    kept(path, {"steps": 1}, "python", dict)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"'steps': 1.*'steps': 2.*remove the file"):
        kept(path, {"steps": 2}, "python", dict)
    assert path.read_bytes() == before


def test_a_run_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def make() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "run.json", {}, "python", make)
    assert not (tmp_path / "run.json").exists()


def test_a_record_keeps_the_arms_and_seeds_it_has_and_takes_new_ones(tmp_path: Path) -> None:
    record, settings = tmp_path / "record.json", {"layers": (0,)}
    assert with_earlier(record, settings, {"a": {"seed 0": {}}}) == {"a": {"seed 0": {}}}
    held = {"settings": settings, "arms": {"a": {"seed 0": {"x": 1}}, "b": {"seed 0": {"x": 2}}}}
    record.write_text(json.dumps(held))
    found = with_earlier(record, settings, {"a": {"seed 0": {"x": 1}, "seed 1": {"x": 3}}, "c": {"seed 0": {"x": 4}}})
    assert found == {
        "a": {"seed 0": {"x": 1}, "seed 1": {"x": 3}},
        "b": {"seed 0": {"x": 2}},
        "c": {"seed 0": {"x": 4}},
    }


def test_a_record_of_other_settings_is_refused(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"settings": {"steps": 1}, "arms": {}}))
    with pytest.raises(ValueError, match=r"steps.*give another --out"):
        with_earlier(record, {"steps": 2}, {})
