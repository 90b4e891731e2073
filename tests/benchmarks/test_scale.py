import copy
import json
import sys
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale import DOCUMENT, Assumed, load_measured, objects_per_shard, rendered, tables
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
    # As for large maps; 8 bits give so few wrong mask bits that small ones have none, and their array no chunk.
    store = extract_here(data, tmp_path / "targets", map_codec="sqrt4")
    (record,) = store.commits.values()
    assert len(record.files) + 1 == objects_per_shard()
    assert len(record.to_bytes()) == pytest.approx(Assumed().commit_bytes, rel=0.15)


@pytest.mark.slow
def test_index_and_packing_are_measured_in_processes_of_their_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scale, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["scale.py", "--measure", "--shards", "2000", "--samples", "300"])
    scale.main()
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert saved["index"]["shards"] == 2000
    assert 200 < saved["index"]["bytes_a_shard"] < 400
    assert saved["index"]["memory_bytes_a_shard"] > saved["index"]["bytes_a_shard"]
    assert saved["order"]["samples"] == 200 * Assumed().samples_per_shard
    assert saved["order"]["memory_bytes_a_sample"] > 16
    assert saved["packing"]["samples"] == 300
    assert saved["packing"]["memory_bytes_a_sample"] > 0
