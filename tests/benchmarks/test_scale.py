import copy
import sys
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale import DOCUMENT, Assumed, load_measured, measure_index, objects_per_shard, rendered, tables
from tests.stages.distilled import extract_here, make_tiny_data


def test_the_document_is_what_the_script_makes_of_the_results_files() -> None:
    assert rendered(DOCUMENT.read_text(), tables(load_measured())) == DOCUMENT.read_text()


def test_other_results_make_another_document_and_a_lost_place_is_named() -> None:
    measured = copy.deepcopy(load_measured())
    measured["attention_codes"]["synthetic"]["codecs"]["sqrt4"]["bytes_a_sample"] *= 2
    assert rendered(DOCUMENT.read_text(), tables(measured)) != DOCUMENT.read_text()
    with pytest.raises(ValueError, match="places for"):
        rendered("# no place", tables(measured))


def test_objects_and_bytes_of_a_commit_record_are_those_of_a_store(tmp_path: Path) -> None:
    data = make_tiny_data(tmp_path, num_samples=5)
    store = extract_here(data, tmp_path / "targets")
    (record,) = store.commits.values()
    assert len(record.files) + 1 == objects_per_shard()
    assert len(record.to_bytes()) == pytest.approx(Assumed().commit_bytes, rel=0.15)


def test_an_index_is_measured_by_loading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    scale.write_index(tmp_path, 1024)
    found = measure_index(tmp_path)
    assert found["samples"] == 1024
    assert 40 < found["bytes_a_sample"] < 100
    monkeypatch.setattr(sys, "argv", ["scale.py", "--load", str(tmp_path)])
    scale.main()
    assert '"samples": 1024' in capsys.readouterr().out
