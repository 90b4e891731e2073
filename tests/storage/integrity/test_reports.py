"""Verification with samples, and the summary of a store."""

from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.targets.manifest import Manifest, create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.storage.builders import VOCAB, extract, manifest, pack, shard_content


@pytest.fixture
def root(tmp_path) -> Path:
    extract(pack(tmp_path / "samples", (7, 3)), open_store(tmp_path / "targets"), skip=("s0-2", "s1-0"))
    return tmp_path


def test_an_undamaged_store_has_no_findings(root):
    report = verify(root / "targets", root / "samples")
    assert report.ok
    assert (report.num_committed, report.num_planned, report.num_samples) == (2, 2, 8)
    stored = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "commits"]
    assert report.num_files == len(
        [path for path in stored if path.name.startswith("samples-") or "shards" in path.parts]
    )
    assert report.num_bytes > 0


def test_a_damaged_tar_is_found(root):
    path = root / "samples/samples-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1")
    assert verify(root / "targets").ok
    (finding,) = verify(root / "targets", root / "samples").findings
    assert str(finding.part) == "samples-000001.tar"
    path.unlink()
    (finding,) = verify(root / "targets", root / "samples").findings
    assert finding.found == "no such file"


def test_other_samples_are_found(root, tmp_path):
    pack(tmp_path / "other", (2, 2))
    files = {finding.file for finding in verify(root / "targets", tmp_path / "other").findings}
    assert "index.json" in files


def test_verify_needs_a_target_store(tmp_path):
    with pytest.raises(UserError, match="is no target store"):
        verify(tmp_path)


def test_a_damaged_manifest_is_a_finding(root):
    path = root / "targets/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"float32"', b'"dtype":"float31"'))
    (finding,) = verify(root / "targets").findings
    assert finding.file == "manifest.json"


def test_the_summary_adds_up(root):
    summary = summarize(root / "targets")
    made_for = Manifest.load(open_store(root / "targets"))
    on_disk = sum(path.stat().st_size for path in (root / "targets/shards").rglob("*") if path.is_file())
    assert summary.total_bytes == sum(summary.array_bytes.values()) == on_disk
    assert (summary.num_committed, summary.num_planned) == (2, 2)
    assert (summary.num_samples, summary.num_skipped) == (8, 2)
    assert summary.skipped_by_reason == {"too_long": 2}
    assert summary.num_map_references == 7
    assert summary.num_maps < summary.num_map_references
    assert summary.raw_logit_bytes == summary.num_answer_rows * VOCAB * 2
    # Every map here has 9 image tokens, and 3 layers of it are captured.
    squares = summary.raw_square_bytes // (3 * 2)
    assert squares == 7 * 81
    assert summary.raw_triangle_bytes == 7 * 45 * 3 * 2
    assert summary.fingerprint_digest == made_for.fingerprint.digest
    assert summary.fingerprint["layers"] == [2, 3, 4]
    assert summary.ratio > 0


def test_the_summary_says_what_shared_maps_save(root):
    summary = summarize(root / "targets")
    own = [name for name in summary.array_bytes if name.startswith(("map_", "window_"))]
    assert {"map_codes", "window_flips", "window_shifts"} < set(own)
    assert summary.map_bytes == sum(summary.array_bytes[name] for name in own)
    # All maps have the same size, so entries are shared as maps are.
    assert summary.sharing_ratio == pytest.approx(summary.num_map_references / summary.num_maps)
    assert summary.shared_bytes == pytest.approx(summary.map_bytes * (7 / summary.num_maps - 1), abs=1)
    assert summary.map_square_ratio == pytest.approx(7 * 81 * 3 * 2 / summary.map_bytes)
    assert summary.map_triangle_ratio == pytest.approx(7 * 45 * 3 * 2 / summary.map_bytes)


def test_sharing_counts_entries_of_maps_of_several_sizes(tmp_path):
    store, made_for = open_store(tmp_path), manifest()
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, ["a", "b", "c"], sizes=(9, 6))
    record = write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])
    assert (record.num_map_tokens, record.num_map_squares) == (15, 81 + 36)
    # Samples a and b share the larger map.
    assert summarize(tmp_path).sharing_ratio == (45 + 45 + 21) / (45 + 21)


def test_the_summary_counts_cut_samples_of_all_shards_and_readers_get_those_of_each(tmp_path):
    store, made_for = open_store(tmp_path), manifest(2)
    create_or_check(store, made_for)
    for shard, lost in enumerate(((0, 30, 12), (5, 0, 0))):
        samples, maps = shard_content(made_for, [f"{shard}-{name}" for name in "abc"])
        samples = [replace(sample, num_cut_answer_tokens=count) for sample, count in zip(samples, lost, strict=True)]
        write_shard(store, shard, made_for, f"samples-{shard:06d}.tar", samples, maps, [])
    summary = summarize(tmp_path)
    assert (summary.num_cut_samples, summary.num_cut_answer_tokens) == (3, 47)
    targets = TargetStore.open(tmp_path).shard(0)
    assert [targets.read(row, with_maps=False)[0].num_cut_answer_tokens for row in range(3)] == [0, 30, 12]


def test_a_store_without_maps_shares_nothing(tmp_path):
    create_or_check(open_store(tmp_path), manifest())
    summary = summarize(tmp_path)
    assert (summary.sharing_ratio, summary.shared_bytes) == (1.0, 0)
    assert summary.map_square_ratio == summary.map_triangle_ratio == 0
