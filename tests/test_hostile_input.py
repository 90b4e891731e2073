"""Files made to harm are refused, without running what they hold and without the memory they ask for."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from pipeline.run_file import load_run_file
from stages.checkpoints.configs import check_configs
from storage.digests import canonical_json
from storage.errors import CorruptData, UserError
from storage.samples.members import BLOCK_BYTES, StoredSample, header, padding
from storage.samples.sample_set import SampleSet
from storage.samples.shard_writer import SampleShardWriter
from storage.samples.table import SampleMembers, table_to_bytes
from storage.stores import open_store
from storage.targets.manifest import Manifest
from tests.storage.builders import stored_samples, write_table
from tests.storage.targets.test_reading import measured


def one_sample(folder: Path) -> tuple[SampleMembers, ...]:
    """The members of a set of one sample."""
    with SampleShardWriter(folder, 9, 10**6) as writer:
        writer.add_group(stored_samples(["a"]))
    return SampleSet.open(folder).members(0)


def store_index(folder: Path, members: tuple[SampleMembers, ...], tar: bytes) -> None:
    """These members of a tar of these bytes, sizes and digest of the table right."""
    (folder / "samples-000000.tar").write_bytes(tar)
    write_table(folder, table_to_bytes(members), bytes=len(tar))


def read_first(folder: Path) -> None:
    with SampleSet.open(folder).shard(0) as shard:
        shard.read(0)


def member(name: str, data: bytes = b"{}", kind: bytes = tarfile.REGTYPE, link: str = "", **settings: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=settings.get("format", tarfile.GNU_FORMAT)) as tar:
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pax(name: str, kind: bytes = tarfile.XHDTYPE, **records: str) -> bytes:
    """A pax header with these records, then a plain member."""
    return member("pax", b"".join(map(_pax_record, records, records.values())), kind)[: -2 * BLOCK_BYTES] + member(name)


def _pax_record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    size = len(rest) + len(str(len(rest) + 3))
    return str(size).encode() + rest


def sparse(name: str, size: int) -> bytes:
    """A GNU sparse member whose map says that its two bytes are the end of a file of that size."""
    head = bytearray(member(name, kind=tarfile.GNUTYPE_SPARSE))
    head[386:410] = b"%011o\0%011o\0" % (size % 8**11, 2)
    head[483:495] = b"%011o\0" % (size % 8**11)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:BLOCK_BYTES])
    return bytes(head)


TARS = {
    "a path above the folder": member("../../a.json"),
    "an absolute path": member("/etc/a.json"),
    "a symbolic link": member("a.json", b"", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": member("a.json", b"", tarfile.LNKTYPE, "/etc/passwd"),
    "a device": member("a.json", b"", tarfile.CHRTYPE),
    "a fifo": member("a.json", b"", tarfile.FIFOTYPE),
    "a directory": member("a.json", b"", tarfile.DIRTYPE),
    "a long GNU name": member("a" * 50_000 + ".json"),
    "a large pax header": member("é" * 50_000 + ".json", format=tarfile.PAX_FORMAT),
    "a pickle": member("a.pkl", pickle.dumps({"id": "a"})),
    "another sample's name": member("b.json"),
    "a header without a name": member(""),
    "a name of other bytes behind a key": member("a.json")[:6] + b"\xff" * 94 + member("a.json")[100:],
    "a sparse member": member("a.json", kind=tarfile.GNUTYPE_SPARSE),
    "a sparse map of a terabyte": sparse("a.json", 2**40),
    "a hard link to itself": member("a.json", b"", tarfile.LNKTYPE, "a.json"),
    "a long GNU link": member("a.json", b"", tarfile.SYMTYPE, "b" * 50_000),
    "pax: another size": pax("a.json", size="9" * 30),
    "pax: another path": pax("a.json", path="../../etc/passwd"),
    "pax: another link": pax("a.json", linkpath="/etc/passwd"),
    "pax: sparse": pax("a.json", **{"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**62)}),
    "pax: for all members": pax("a.json", kind=tarfile.XGLTYPE, path="b.json", size="0"),
    "a gzipped tar inside": member("a.json", gzip.compress(member("a.json"))),
    "a gzipped tar": gzip.compress(member("a.json")) + bytes(2 * BLOCK_BYTES),
    "a size in base 256": member("a.json")[:124] + b"\x80" + b"\xff" * 11 + member("a.json")[136:],
}


@pytest.mark.parametrize("kind", TARS)
def test_members_other_than_the_writers_are_refused_wherever_the_index_points(tmp_path, kind):
    one_sample(tmp_path)
    tar = TARS[kind]
    for offset in range(BLOCK_BYTES, len(tar), BLOCK_BYTES * max(1, len(tar) // 20_000)):
        for num_bytes in (0, 2, 300):
            if offset + num_bytes <= len(tar):
                data = tar[offset : offset + num_bytes]
                store_index(tmp_path, (SampleMembers("a", ((offset, num_bytes),), zlib.crc32(data)),), tar)
                with pytest.raises(CorruptData):
                    read_first(tmp_path)


def test_a_million_pax_records_before_a_member_change_nothing_of_it(tmp_path):
    one_sample(tmp_path)
    records = b"".join(_pax_record(key, value) for key, value in (("path", "b.json"), ("size", "0"))) * 500_000
    before = header("pax", len(records)) + records + bytes(padding(len(records)))
    tar = before + header("a.json", 2) + b"{}" + bytes(3 * BLOCK_BYTES - 2)
    store_index(tmp_path, (SampleMembers("a", ((len(before) + BLOCK_BYTES, 2),), zlib.crc32(b"{}")),), tar)
    with SampleSet.open(tmp_path).shard(0) as shard:
        assert shard.read(0) == StoredSample("a", {}, ())


@pytest.mark.parametrize(
    "name", ["pipe:echo harm", "../samples-000000.tar", "/etc/passwd", "s3://x/y", "samples-000000.tar|sh"]
)
def test_shards_are_named_by_number_and_nothing_else(tmp_path, name):
    write_table(tmp_path, table_to_bytes(one_sample(tmp_path)), name=name)
    with pytest.raises(CorruptData, match="name"):
        read_first(tmp_path)


@pytest.mark.parametrize(
    "record",
    [b"[" * 100_000, b'{"id": NaN}', b'{"id": 1e999}', b'{"id": ' + b"9" * 100_000 + b"}", b'"text"', b"\x80\x04."],
)
def test_a_conversation_that_is_no_plain_json_is_refused(tmp_path, record):
    one_sample(tmp_path)
    info = tarfile.TarInfo("a.json")
    info.size, info.mode = len(record), 0o644
    padding = bytes(-len(record) % BLOCK_BYTES)
    tar = info.tobuf(tarfile.USTAR_FORMAT) + record + padding
    store_index(tmp_path, (SampleMembers("a", ((BLOCK_BYTES, len(record)),), zlib.crc32(record)),), tar)
    with pytest.raises(CorruptData):
        read_first(tmp_path)


_INDEX_READER = """
import sys
from pathlib import Path
from benchmarks.memory import PeakMemory
from storage.errors import UserError
from tests.test_hostile_input import read_first
memory = PeakMemory()
for folder in sys.argv[1:]:
    try:
        read_first(Path(folder))
        print("read")
    except UserError:
        print("refused")
print(memory.grown_bytes)
"""


def test_sparse_giants_and_sizes_that_lie_need_no_memory(tmp_path):
    folders = [tmp_path / name for name in ("index", "table", "tar", "member")]
    for folder in folders:
        one_sample(folder)
    for file in (folders[0] / "index.json", folders[1] / "samples-000000.json"):
        with file.open("r+b") as opened:
            opened.truncate(20 * 2**30)
    giant = 8 * 2**30
    for folder, span in ((folders[2], (BLOCK_BYTES, giant)), (folders[3], (giant, 2))):
        write_table(folder, table_to_bytes([SampleMembers("a", (span,), 0)]), bytes=giant + 2 * BLOCK_BYTES)
        with (folder / "samples-000000.tar").open("r+b") as opened:
            opened.truncate(giant + 2 * BLOCK_BYTES)
    answers, mebibytes = measured(_INDEX_READER, *folders)
    assert answers == ["refused"] * 4
    assert mebibytes < 100


def _png_of(side: int) -> bytes:
    """A picture of one colour whose few bytes stand for side * side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


_IMAGE_READER = """
import sys
from pathlib import Path
from benchmarks.memory import PeakMemory
from stages.images import decode_image
from stages.unusable_sample import UnusableSample
memory = PeakMemory()
for file in sys.argv[1:]:
    try:
        decode_image(Path(file).read_bytes())
        print("read")
    except UnusableSample:
        print("refused")
print(memory.grown_bytes)
"""


def test_pictures_of_too_many_pixels_need_no_memory(tmp_path):
    files = []
    for side in (8_000, 60_000, 2**31 - 1):
        files.append(tmp_path / f"{side}.png")
        files[-1].write_bytes(_png_of(side))
    answers, mebibytes = measured(_IMAGE_READER, *files)
    assert answers == ["refused"] * 3
    assert mebibytes < 100


@pytest.mark.parametrize(
    "data",
    [
        b'{"format_version": 3, "x": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"[" * 10**6,
        b'{"format_version": ' + b"9" * 10**6 + b"}",
        b'{"format_version":3,"x":1e999}',
        b'{"format_version":3,"x":NaN}',
        b'{"format_version":3,"x":"\\ud800"}',
        canonical_json({"format_version": 3, "x": 1}) + b" ",
        b'{"format_version":true}',
    ],
)
def test_a_manifest_that_is_no_canonical_json_is_refused(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CorruptData):
        Manifest.load(open_store(tmp_path))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch harm']", "!!python/name:os.system", "!new x"])
def test_a_run_file_makes_no_objects(tmp_path, tag, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"samples: {tag}\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_run_file(tmp_path / "run.yaml", [], {})
    assert not (tmp_path / "harm").exists()


def test_a_run_file_that_stands_for_gigabytes_gives_a_short_error(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]")
    (tmp_path / "run.yaml").write_text("\n".join([*lines, "samples: *i"]))
    with pytest.raises(UserError) as caught:
        load_run_file(tmp_path / "run.yaml", [], {})
    assert len(str(caught.value)) < 5000


def test_a_checkpoint_that_brings_code_is_refused_and_the_code_does_not_run(tmp_path):
    name = "config.json"
    (tmp_path / "harm.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "harm", "auto_map": {"AutoConfig": "harm.Harm"}}
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match="asks for code of its own"):
        check_configs(tmp_path)
    (tmp_path / name).write_text(json.dumps(config | {"model_type": "llava"}))
    check_configs(tmp_path)
    (tmp_path / name).write_bytes(b"[" * 10**6)
    with pytest.raises(CorruptData):
        check_configs(tmp_path)
