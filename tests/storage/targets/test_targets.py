"""Target shards: round trip, commit protocol, and no damage that is read in silence."""

import dataclasses
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from storage.codecs.attention_maps import EncodedMaps
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.integrity.verify import verify
from storage.regular_files import MAX_BYTES
from storage.stores import LocalStore, local, open_store
from storage.targets import array_writer
from storage.targets.array_writer import ROWS_A_CHUNK
from storage.targets.cleaning import clean_partials
from storage.targets.commits import SkippedSample
from storage.targets.layout import ARRAYS
from storage.targets.manifest import create_or_check
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from tests.recorded_progress import RecordedProgress
from tests.storage.builders import VOCAB, as_a_dead_process, files_of, manifest, sample_targets, shard_content

KEYS = [f"k{number}" for number in range(12)]
SKIPPED = [SkippedSample("bad", "7", "image_unreadable", "truncated")]


def write(store, seed=0, keys=KEYS, sizes=(9, 9, 6), skipped=(), index=0, **changes):
    made_for = manifest(num_shards=3, **changes)
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, keys, seed, sizes)
    record = write_shard(store, index, made_for, f"samples-{index:06d}.tar", samples, maps, list(skipped))
    return record, samples, maps


def assert_equal(left, right):
    for field in dataclasses.fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), field.name
        elif dataclasses.is_dataclass(ours):
            assert_equal(ours, theirs)
        else:
            assert ours == theirs, field.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"map_codec": MapCodecConfig(name="float16")},
        {"map_codec": MapCodecConfig(name="sqrt8")},
        {"map_codec": MapCodecConfig(name="sqrt2")},
        {"map_codec": MapCodecConfig(name="auto", sqrt8_below=9)},
        {"map_codec": MapCodecConfig(name="sqrt4", causal=False)},
        {"logit_codec": LogitCodecConfig(vocab_size=VOCAB, top_k=1000)},
        {"logit_codec": LogitCodecConfig(name="float16", vocab_size=VOCAB, top_k=7)},
        {"windows": ()},
    ],
    ids=["sqrt4", "float16", "sqrt8", "sqrt2", "auto", "square", "all-logits", "float16-logits", "no-windows"],
)
@pytest.mark.parametrize("sizes", [(9,), (1, 20, 3)])
def test_targets_round_trip(tmp_path, changes, sizes):
    record, samples, maps = write(open_store(tmp_path), sizes=sizes, skipped=SKIPPED, **changes)
    targets = TargetStore.open(tmp_path)
    assert targets.commits == {0: record}
    shard = targets.shard(0)
    assert list(shard.keys) == KEYS
    assert shard.keys.index("k3") == 3
    assert "bad" not in shard.keys
    for row, sample in enumerate(samples):
        found, found_maps = shard.read(row)
        assert_equal(found, sample)
        if sample.map_row is None:
            assert found_maps is None
        else:
            assert_equal(found_maps, maps[sample.map_row])
        assert shard.read(row, with_maps=False)[1] is None
    assert record.skipped == tuple(SKIPPED)
    with pytest.raises(IndexError):
        shard.read(len(KEYS))
    assert verify(tmp_path).findings == ()


def test_layers_are_chosen_by_their_teacher_number(tmp_path):
    _, _, maps = write(open_store(tmp_path))
    shard = TargetStore.open(tmp_path).shard(0)
    for layers, rows in (([4, 2], [2, 0]), ([3, 4], [1, 2]), ([2], [0]), ([], [])):
        found = shard.read(0, layers=layers)[1]
        assert torch.equal(found.codes_LC, maps[0].codes_LC[rows])
        assert torch.equal(found.caps_L, maps[0].caps_L[rows])
        # What makes windows exact cannot be decoded without all layers.
        assert found.windows is None
    with pytest.raises(UserError, match=r"layers \[5\] were not captured"):
        shard.read(0, layers=[2, 5])


def test_shards_without_samples_images_or_answers_round_trip(tmp_path):
    store = open_store(tmp_path)
    made_for = manifest(num_shards=2)
    create_or_check(store, made_for)
    write_shard(store, 0, made_for, "samples-000000.tar", [], [], SKIPPED)
    text_only = [sample_targets(made_for, "t", 4, 0, None, seed=1)]
    write_shard(store, 1, made_for, "samples-000001.tar", text_only, [], [])
    targets = TargetStore.open(tmp_path)
    assert len(targets.shard(0)) == 0
    sample, maps = targets.shard(1).read(0)
    assert_equal(sample, text_only[0])
    assert maps is None
    assert verify(tmp_path).findings == ()


def test_more_answer_rows_than_a_chunk_round_trip(tmp_path):
    store = open_store(tmp_path)
    made_for = manifest()
    create_or_check(store, made_for)
    samples = [sample_targets(made_for, f"k{n}", 128, 120, None, seed=n) for n in range(5)]
    assert sum(len(sample.logits_RQ) for sample in samples) > 2 * ROWS_A_CHUNK
    write_shard(store, 0, made_for, "samples-000000.tar", samples, [], [])
    shard = TargetStore.open(tmp_path).shard(0)
    for row, sample in enumerate(samples):
        assert_equal(shard.read(row)[0], sample)


def test_a_shard_is_few_files_and_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        record, *_ = write(open_store(tmp_path / name), skipped=SKIPPED)
        write(open_store(tmp_path / name), skipped=SKIPPED)
    assert len(record.files) < 50
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(files_of(tmp_path / "a")) == len(record.files) + 2


def test_every_flipped_byte_is_found_by_verify_and_never_read_in_silence(tmp_path):
    _, samples, maps = write(open_store(tmp_path))
    chance = random.Random(0)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for path in [*files, *chance.choices(files, k=30)]:
        clean = path.read_bytes()
        position = chance.randrange(len(clean))
        path.write_bytes(
            clean[:position] + bytes([clean[position] ^ (1 << chance.randrange(8))]) + clean[position + 1 :]
        )
        report = verify(tmp_path)
        assert report.findings, path
        try:
            shard = TargetStore.open(tmp_path).shard(0)
            read = [shard.read(row) for row in range(len(shard))]
        except UserError:
            pass
        else:
            # The group's own metadata and padding hold nothing that is read.
            for sample, (found, found_maps) in zip(samples, read, strict=True):
                assert_equal(found, sample)
                if sample.map_row is not None:
                    assert_equal(found_maps, maps[sample.map_row])
        path.write_bytes(clean)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_file_that_is_missing_or_of_another_size_is_named(tmp_path, damage):
    record, *_ = write(open_store(tmp_path))
    for name in record.files:
        path = tmp_path / record.path / name
        clean = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(clean[:-1] if damage == "truncated" else clean + b"\0")
        with pytest.raises(CorruptData, match=f"shard 0 .*{name}.*expected {len(clean)} bytes; run `cdp verify`"):
            TargetStore.open(tmp_path).shard(0)
        assert any(finding.file == name for finding in verify(tmp_path).findings)
        path.write_bytes(clean)


def test_a_chunk_that_vanishes_after_opening_is_an_error_and_not_zeros(tmp_path):
    record, *_ = write(open_store(tmp_path))
    shard = TargetStore.open(tmp_path).shard(0)
    (tmp_path / record.path / "map_codes/c/0/0").unlink()
    with pytest.raises(CorruptData, match="map_codes"):
        shard.read(0)
    shutil.rmtree(tmp_path / record.path)
    with pytest.raises(CorruptData, match="its folder"):
        TargetStore.open(tmp_path).shard(0)


def test_verify_goes_on_after_a_fault_and_notices_strange_files(tmp_path):
    store = open_store(tmp_path)
    for index in range(3):
        record, *_ = write(store, index=index)
        (tmp_path / record.path / "strange").write_bytes(b"x")
    (tmp_path / "commits/000001.json").write_bytes(b"{}")
    progress = RecordedProgress()
    report = verify(tmp_path, progress=progress)
    assert sorted((str(finding.part), finding.file) for finding in report.findings) == [
        ("0", "strange"),
        ("1", "commits/000001.json"),
        ("2", "strange"),
    ]
    task = progress.named("verify")
    assert (task.done, task.total) == (2, 2)
    assert report.num_committed == 3


def test_a_shard_of_another_fingerprint_or_not_committed_is_refused(tmp_path):
    store = open_store(tmp_path)
    write(store)
    write_shard(store, 1, manifest(max_length=4), "samples-000001.tar", [], [], [])
    with pytest.raises(FingerprintMismatch, match="shard 1"):
        TargetStore.open(tmp_path)
    (tmp_path / "commits/000001.json").unlink()
    with pytest.raises(UserError, match=r"shard 1 .* is not committed"):
        TargetStore.open(tmp_path).shard(1)


def test_the_first_commit_counts_and_the_other_leaves_nothing(tmp_path):
    store = open_store(tmp_path)
    first, *_ = write(store, seed=1)
    before = files_of(tmp_path)
    second, *_ = write(store, seed=2)
    assert second == first
    assert files_of(tmp_path) == before


def test_concurrent_writers_agree_on_one_record(tmp_path):
    records = []

    def run(seed: int) -> None:
        records.append(write(open_store(tmp_path), seed=seed)[0])

    threads = [threading.Thread(target=run, args=(number // 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 6
    assert len({record.digest for record in records}) == 1
    assert TargetStore.open(tmp_path).commits[0] == records[0]
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert verify(tmp_path).ok


_KILLED = """
import sys
from pathlib import Path
from storage.stores import local, open_store
from tests.storage.targets.test_targets import write
print("ready", flush=True)
for index in range(3):
    write(open_store(Path(sys.argv[1])), index=index, seed=index)
"""


def test_kill_at_any_moment_then_rerun_gives_the_same_bytes(tmp_path):
    whole = open_store(tmp_path / "whole")
    for index in range(3):
        write(whole, index=index, seed=index)
    killed = tmp_path / "killed"
    for delay_s in (0.05, 0.2):
        process = subprocess.Popen([sys.executable, "-c", _KILLED, str(killed)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.kill()
        process.wait()
        process.stdout.close()
        if (killed / "manifest.json").exists():
            TargetStore.open(killed)
    store = open_store(killed)
    clean_partials(store)
    for index in range(3):
        write(store, index=index, seed=index)
    found, expected = files_of(killed), files_of(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_dying_before_any_fsync_leaves_a_store_that_a_rerun_completes(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, done, last = local._fsync, [0], [10**9]

    def die(path):
        done[0] += 1
        if done[0] >= last[0]:
            raise Killed
        real(path)

    monkeypatch.setattr(local, "_fsync", die)
    write(open_store(tmp_path / "whole"))
    whole, num_steps = files_of(tmp_path / "whole"), done[0]
    assert num_steps > 40
    for step in (1, 20, *range(num_steps - 3, num_steps + 1)):
        root = tmp_path / f"killed{step}"
        done[0], last[0] = 0, step
        # A killed process cleans nothing up.
        with monkeypatch.context() as patch:
            patch.setattr("storage.targets.shard_writer.shutil.rmtree", lambda *_, **__: None)
            with as_a_dead_process(), pytest.raises(Killed):
                write(open_store(root))
        last[0] = 10**9
        TargetStore.open(root)
        clean_partials(open_store(root))
        write(open_store(root))
        assert files_of(root) == whole


def test_two_shards_that_fail_at_the_same_moment_both_end(tmp_path, monkeypatch):
    together = threading.Barrier(2)

    def fail(*_):
        together.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(array_writer, "_write_arrays", fail)
    arrays = {spec.name: None for spec in ARRAYS}

    def write_and_fail():
        for _ in range(20):
            with pytest.raises(OSError, match="No space"):
                array_writer.write_group(tmp_path, arrays, {})

    threads = [threading.Thread(target=write_and_fail, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_folders_of_lost_races_are_cleaned(tmp_path):
    store = open_store(tmp_path)
    record, *_ = write(store)
    shutil.copytree(tmp_path / record.path, tmp_path / "shards/000000-0123456789abcdef.zarr")
    with as_a_dead_process():
        store.staging("shards/000007.zarr")
    assert clean_partials(store) == 2
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [record.path.removeprefix("shards/")]


class Counting(LocalStore):
    """Notes what a caller asks for."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = []

    def read(self, path, max_bytes=MAX_BYTES):
        self.asked.append(f"read {path}")
        return super().read(path, max_bytes)

    def list(self, prefix=""):
        self.asked.append(f"list {prefix}")
        return super().list(prefix)


def test_cleaning_reads_a_record_only_where_a_shard_has_several_folders_and_lists_no_shard(tmp_path, monkeypatch):
    store = Counting(tmp_path)
    records = [write(store, index=index)[0] for index in range(3)]
    lost = tmp_path / "shards/000001-0123456789abcdef.zarr"
    shutil.copytree(tmp_path / records[1].path, lost)
    scanned, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: [scanned.append(str(path)), real(path)][1])
    store.asked.clear()
    assert clean_partials(store) == 1
    assert store.asked == ["read commits/000001.json"]
    assert not lost.exists()
    assert str(tmp_path / "shards") in scanned
    assert not [path for path in scanned if any(path.startswith(str(tmp_path / record.path)) for record in records)]


def broken(samples: list[SampleTargets], maps: list[EncodedMaps], what: str) -> None:
    def change(target, row, **fields):
        target[row] = dataclasses.replace(target[row], **fields)

    match what:
        case "key":
            change(samples, 1, key="k0")
        case "map row":
            change(samples, 0, map_row=99)
        case "mask":
            change(samples, 0, answer_mask=samples[0].answer_mask[:-1])
        case "rows":
            change(samples, 0, answer_mask=torch.zeros_like(samples[0].answer_mask))
        case "first":
            change(
                samples,
                3,
                answer_mask=torch.eye(1, len(samples[3].token_ids)).bool()[0],
                logits_RQ=samples[0].logits_RQ,
            )
        case "ids":
            change(samples, 0, logits_RQ=torch.full_like(samples[0].logits_RQ, 255))
        case "mass":
            change(samples, 0, logits_RQ=torch.zeros_like(samples[0].logits_RQ))
        case "record":
            change(samples, 0, logits_RQ=samples[0].logits_RQ[:, :-1])
        case "codes":
            change(maps, 0, num_tokens=8)
        case "caps":
            change(maps, 0, caps_L=maps[0].caps_L * float("nan"))
        case "dtype":
            change(maps, 0, codes_LC=maps[0].codes_LC.half())
        case "flips":
            past_the_end = torch.full((9,), 254, dtype=torch.uint8)
            change(maps, 0, windows=dataclasses.replace(maps[0].windows, flips_G=past_the_end))
        case "windows":
            change(maps, 0, windows=None)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("key", "comes twice"),
        ("map row", "map rows"),
        ("mask", "mask"),
        ("rows", "expected"),
        ("first", "first token"),
        ("ids", "past the vocabulary"),
        ("mass", "sum to"),
        ("record", r"expected \(1, "),
        ("codes", "map 0 of 8 tokens"),
        ("caps", "NaN"),
        ("dtype", "expected torch.uint8"),
        ("flips", "a flip lies at entry 2294 of masks that have 90 entries"),
        ("windows", "map 0 was read without its windows"),
    ],
)
def test_targets_that_contradict_themselves_are_not_written(tmp_path, what, message):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    samples, maps = shard_content(manifest(), KEYS)
    broken(samples, maps, what)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_shard(store, 0, manifest(), "samples-000000.tar", samples, maps, [])
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("lost", ["map_codes", "map_codes/c", "zarr.json"])
def test_a_shard_whose_staging_lost_files_is_not_committed(tmp_path, monkeypatch, lost):
    from storage.targets import shard_writer as writer

    def measure_after_cleaning(folder):
        path = folder / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return measured(folder)

    measured = writer.measure_files
    monkeypatch.setattr(writer, "measure_files", measure_after_cleaning)
    store = open_store(tmp_path)
    made_for = manifest()
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, ["a", "b", "c"], sizes=(9,))
    with pytest.raises(CorruptData, match=r"lost .* while it was written"):
        write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])
    assert not TargetStore.open(tmp_path).commits
