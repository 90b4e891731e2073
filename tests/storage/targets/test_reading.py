"""A reader gives what was committed or an error: no fill value, no fewer samples, no memory that files do not allow."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from storage.digests import canonical_json
from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.samples.table import table_to_bytes
from storage.stores import open_store
from storage.stores.base import measure_files
from storage.streaming.stream import StreamConfig
from storage.targets.commits import CommitRecord
from storage.targets.layout import ARRAYS, ArraySpec
from storage.targets.store import TargetStore
from tests.storage.builders import extract, pack, target_stream, write_table

INDEX_ENTRY = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`samples/` and `targets/` with one shard."""
    extract(pack(tmp_path / "samples", (7,)), open_store(tmp_path / "targets"))
    return tmp_path


def folder_of(root: Path) -> Path:
    store = TargetStore.open(root / "targets")
    return root / "targets" / store.commits[0].path


def read_all(root: Path) -> int:
    shard = TargetStore.open(root / "targets").shard(0)
    for row in range(len(shard)):
        shard.read(row)
    return len(shard)


def recommit(root: Path, folder: Path, **changes: object) -> None:
    """Make every digest right again, as a forger would."""
    record = TargetStore.open(root / "targets").commits[0]
    content = (
        record.model_dump(exclude={"format_version", "path", "digest"}) | {"files": measure_files(folder)} | changes
    )
    content["skipped"] = record.skipped
    forged = CommitRecord.build(**content)
    folder.rename(root / "targets" / forged.path)
    (root / "targets/commits/000000.json").write_bytes(forged.to_bytes())


def sharded_files(folder: Path) -> list[tuple[ArraySpec, Path]]:
    """Each file of many inner chunks; an array without elements has none."""
    sharded = [spec for spec in ARRAYS if spec.sharded]
    return [(spec, path) for spec in sharded for path in (folder / spec.name / "c").rglob("*") if path.is_file()]


def with_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def test_no_inner_chunk_can_be_left_out_even_if_all_checksums_are_made_right(root):
    folder = folder_of(root)
    assert read_all(root) == 7
    tried = 0
    for spec, file in sharded_files(folder):
        array = zarr.open_array(folder / spec.name, mode="r")
        num_inner = int(np.prod([o // i for o, i in zip(array.shards, array.chunks, strict=True)]))
        clean = file.read_bytes()
        start = len(clean) - num_inner * INDEX_ENTRY - 4
        for number in range(num_inner):
            index = bytearray(clean[start:-4])
            index[number * INDEX_ENTRY : (number + 1) * INDEX_ENTRY] = b"\xff" * INDEX_ENTRY
            file.write_bytes(clean[:start] + with_crc(bytes(index)))
            # Zarr itself gives zeros.
            assert zarr.open_array(folder / spec.name, mode="r")[...].shape == array.shape
            with pytest.raises(CorruptData, match="leaves out one of its"):
                read_all(root)
            tried += 1
        file.write_bytes(clean)
    assert tried > 10
    assert read_all(root) == 7


def test_every_missing_chunk_file_is_an_error_before_and_after_the_shard_is_opened(root):
    folder = folder_of(root)
    opened = TargetStore.open(root / "targets").shard(0)
    chunks = [path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(chunks) >= len(ARRAYS) - 2
    for chunk in chunks:
        data = chunk.read_bytes()
        chunk.unlink()
        with pytest.raises(CorruptData, match="no file"):
            read_all(root)
        name = chunk.relative_to(folder).parts[0]
        with pytest.raises(CorruptData, match="is missing"):
            opened._read(name)
        chunk.write_bytes(data[:-1])
        with pytest.raises(CorruptData, match=f"{len(data) - 1} bytes"):
            read_all(root)
        chunk.write_bytes(data)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_at_every_length(root):
    folder = folder_of(root)
    shard = TargetStore.open(root / "targets").shard(0)
    for _, file in sharded_files(folder):
        clean = file.read_bytes()
        for length in range(0, len(clean), max(1, len(clean) // 40)):
            file.write_bytes(clean[:length])
            with pytest.raises(CorruptData):
                [shard.read(row) for row in range(len(shard))]
        file.write_bytes(clean)


def _stream_keys(root: Path) -> list[str]:
    config = StreamConfig(seed=0, batch_size=1)
    stream = target_stream(root / "samples", root / "targets", config)
    return [sample.key for batch in stream for sample in batch]


def test_a_sample_index_with_fewer_samples_is_refused_whatever_it_says_of_itself(root):
    assert len(_stream_keys(root)) == 7
    samples = root / "samples"
    index, members = (samples / "index.json").read_bytes(), SampleSet.open(samples).members(0)
    for lie in (members[:-1], (*members[:-1], members[0]), members[::-1]):
        for num_samples in {7, len(lie)}:
            write_table(samples, table_to_bytes(lie), num_samples=num_samples)
            with pytest.raises(UserError):
                _stream_keys(root)
    (samples / "index.json").write_bytes(json.dumps({**json.loads(index), "shards": []}).encode())
    with pytest.raises(FingerprintMismatch):
        _stream_keys(root)


@pytest.mark.parametrize(
    "lie",
    [
        {"num_samples": 6},
        {"num_samples": 8},
        {"num_tokens": 10**15},
        {"num_answer_rows": 1},
        {"num_cut_samples": 1},
        {"num_cut_answer_tokens": 1},
        {"num_maps": 1},
        {"num_maps": 10**12},
        {"num_map_references": 0},
    ],
    ids=str,
)
def test_a_record_whose_counts_lie_is_refused_though_its_digest_is_right(root, lie):
    recommit(root, folder_of(root), **lie)
    with pytest.raises(CorruptData):
        read_all(root)


def test_a_record_that_leaves_out_a_sample_of_the_tar_is_refused_by_the_stream(root):
    other = root / "other"
    extract(pack(other / "samples", (6,)), open_store(other / "targets"))
    record = TargetStore.open(other / "targets").commits[0]
    shutil.rmtree(folder_of(root))
    shutil.copytree(other / "targets" / record.path, root / "targets" / record.path)
    wanted = TargetStore.open(root / "targets").manifest.digest
    forged = CommitRecord.build(
        **record.model_dump(exclude={"format_version", "path", "digest"}) | {"manifest": wanted}
    )
    (root / "targets" / record.path).rename(root / "targets" / forged.path)
    (root / "targets/commits/000000.json").write_bytes(forged.to_bytes())
    assert read_all(root) == 6
    with pytest.raises(CorruptData, match="which are not the 7"):
        _stream_keys(root)


def _zstd_claiming(num_bytes: int) -> bytes:
    """A frame of one repeated byte that claims `num_bytes`."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", num_bytes) + struct.pack("<I", (1000 << 3) | 3)[:3] + b"\0"


def _zstd_zeros(num_bytes: int) -> bytes:
    """A real frame of zeros: 4 bytes for every 128 KiB."""
    blocks, block = -(-num_bytes // 131072), 131072
    sizes = [block] * (blocks - 1) + [num_bytes - block * (blocks - 1)]
    body = b"".join(
        struct.pack("<I", (size << 3) | 2 | (number == blocks - 1))[:3] + b"\0" for number, size in enumerate(sizes)
    )
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", num_bytes) + body


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_bytes())
    change(fields)
    path.write_bytes(json.dumps(fields).encode())


GIGABYTES = 8 * 2**30


def _grow(fields: dict) -> None:
    fields["shape"] = [GIGABYTES]
    fields["chunk_grid"]["configuration"]["chunk_shape"] = [GIGABYTES]


def _grow_inner(fields: dict) -> None:
    shape = fields["shape"]
    fields["chunk_grid"]["configuration"]["chunk_shape"] = [shape[0], GIGABYTES]
    fields["codecs"][0]["configuration"]["chunk_shape"] = [1, GIGABYTES]


BOMBS: dict[str, Callable[[Path], object]] = {
    "a chunk that claims gigabytes": lambda f: (f / "token_ids/c/0").write_bytes(with_crc(_zstd_claiming(GIGABYTES))),
    "a chunk of gigabytes of zeros": lambda f: (f / "token_ids/c/0").write_bytes(with_crc(_zstd_zeros(GIGABYTES))),
    "two frames": lambda f: (f / "token_ids/c/0").write_bytes(
        with_crc(_zstd_zeros(4 * zarr.open_array(f / "token_ids", mode="r").shape[0]) + _zstd_zeros(GIGABYTES))
    ),
    "an array of gigabytes": lambda f: (
        _edit(f / "sample_keys/zarr.json", _grow),
        (f / "sample_keys/c/0").write_bytes(with_crc(_zstd_zeros(GIGABYTES))),
    ),
    "inner chunks of gigabytes": lambda f: _edit(f / "map_codes/zarr.json", _grow_inner),
    "a wide type": lambda f: _edit(f / "token_ids/zarr.json", lambda d: d.update(data_type="complex128")),
    "another codec": lambda f: _edit(
        f / "token_ids/zarr.json", lambda d: d["codecs"].insert(1, {"name": "blosc", "configuration": {}})
    ),
    "another key encoding": lambda f: _edit(
        f / "token_ids/zarr.json", lambda d: d.update(chunk_key_encoding={"name": "v2"})
    ),
    "deep nesting": lambda f: (f / "token_ids/zarr.json").write_bytes(b"[" * 10**6),
    "a huge number": lambda f: (f / "token_ids/zarr.json").write_bytes(b'{"shape": [' + b"9" * 10**6 + b"]}"),
}

_READER = """
import sys
from pathlib import Path
from benchmarks.memory import PeakMemory
from storage.errors import CorruptData
from storage.targets.store import TargetStore
from tests.storage.targets.test_reading import read_all
memory = PeakMemory()
for root in sys.argv[1:]:
    try:
        read_all(Path(root))
        print("read")
    except CorruptData:
        print("refused")
print(memory.grown_bytes)
"""


def measured(script: str, *arguments: object) -> tuple[list[str], float]:
    """Lines that a script printed in a process of its own, and the MiB that it says it needed (its last line)."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    *lines, num_bytes = done.stdout.split()
    return lines, int(num_bytes) / 2**20


_ALLOCATION = """
from benchmarks.memory import PeakMemory
memory = PeakMemory()
len(bytearray(b"x") * (300 * 2**20))
print(memory.grown_bytes)
"""


def test_what_a_child_needs_for_a_moment_is_seen_below_the_peak_of_its_parent():
    len(bytearray(b"x") * (800 * 2**20))
    _, mebibytes = measured(_ALLOCATION)
    assert mebibytes == pytest.approx(300, abs=10)


def test_forged_metadata_and_chunks_are_refused_without_the_memory_they_ask_for(root, tmp_path_factory):
    copies = []
    for bomb in BOMBS:
        copy = tmp_path_factory.mktemp("bomb") / "copy"
        shutil.copytree(root, copy)
        folder = folder_of(copy)
        BOMBS[bomb](folder)
        recommit(copy, folder)
        copies.append(copy)
    answers, mebibytes = measured(_READER, *copies)
    assert dict(zip(BOMBS, answers, strict=True)) == dict.fromkeys(BOMBS, "refused")
    assert mebibytes < 200


def test_a_record_of_files_outside_its_folder_is_refused(root):
    record = TargetStore.open(root / "targets").commits[0]
    for name in ("../../manifest.json", "/etc/passwd"):
        files = {**record.files, name: (1, "0" * 64)}
        forged = record.model_copy(update={"files": files})
        fields = {**forged.model_dump(mode="json"), "digest": forged.content_digest()}
        fields["path"] = forged.folder_for(fields["digest"])
        (root / "targets/commits/000000.json").write_bytes(canonical_json(fields))
        with pytest.raises(CorruptData, match="does not stay inside"):
            TargetStore.open(root / "targets")


@pytest.mark.parametrize("spec", ARRAYS, ids=lambda spec: spec.name)
def test_every_part_of_an_array_is_what_zarr_reads(root, spec):
    array = zarr.open_array(folder_of(root) / spec.name, mode="r")
    reader = TargetStore.open(root / "targets").shard(0)._arrays[spec.name]
    assert_equal(reader.read(), array[...])
    draws = np.random.default_rng(0)
    for _ in range(30):
        parts: list[slice | list[int]] = []
        for size in array.shape:
            start, stop = sorted(draws.integers(0, size + 1, 2).tolist())
            some = draws.integers(0, max(size, 1), 3).tolist()
            parts.append(some if size and draws.random() < 0.3 else slice(start, stop))
        assert_equal(reader.read(*parts), array.oindex[tuple(parts)])


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def test_a_chunk_whose_index_points_outside_its_file_is_an_error_without_the_memory_it_asks_for(root):
    folder = folder_of(root)
    for _, file in sharded_files(folder):
        clean = file.read_bytes()
        for lie in ((0, 2**63), (2**63, 100), (2**64 - 2, 2**64 - 2), (len(clean) - 4, 8)):
            file.write_bytes(clean)
            num_inner = next(
                a for a in range(1, len(clean)) if with_crc(clean[-4 - 16 * a : -4]) == clean[-4 - 16 * a :]
            )
            start = len(clean) - 4 - 16 * num_inner
            file.write_bytes(clean[:start] + with_crc(struct.pack("<QQ", *lie) + clean[start + 16 : -4]))
            with pytest.raises(CorruptData, match="ends beyond"):
                read_all(root)
        file.write_bytes(clean)
    assert read_all(root) == 7
