"""Writing sample shards and their member tables: one pass, groups kept together, the index last."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

from storage.errors import UserError
from storage.samples.index import INDEX_PATH, MAX_INDEX_BYTES, SampleIndex, SampleShardEntry
from storage.samples.members import BLOCK_BYTES, Member, StoredSample, header, members_of, padding
from storage.samples.table import MAX_TABLE_BYTES, SampleMembers, table_to_bytes
from storage.stores import PARTIAL, LocalStore

_END = bytes(2 * BLOCK_BYTES)


class SampleShardWriter:
    """Writes `samples-000000.tar` with `samples-000000.json`, ... and, on a clean exit, `index.json`.

    Equal samples in equal order give equal bytes. After an exception no index exists and the shard being
    written is gone; running again starts over. Without the index the folder is no sample set.

    Args:
        out: Folder to write to; created if need be.
        max_samples: Most samples in one shard.
        max_bytes: Most bytes in one shard; one larger sample still gets a shard of its own.
    """

    def __init__(self, out: Path, max_samples: int, max_bytes: int) -> None:
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(f"limits are {max_samples} samples and {max_bytes} bytes, both must be at least 1")
        self._out = Path(out)
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._keys: set[str] = set()
        self._entries: list[SampleShardEntry] = []
        self._index_bytes = 0
        self._tar: _Tar | None = None

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        if (self._out / INDEX_PATH).exists():
            raise UserError(
                f"{self._out} already holds a finished sample set; "
                f"choose another folder, or remove {INDEX_PATH} there to pack again"
            )
        for pattern in ("samples-*.tar", "samples-*.json", f"samples-*{PARTIAL}"):
            for left_over in self._out.glob(pattern):
                left_over.unlink()
        return self

    def add_group(self, samples: Sequence[StoredSample]) -> None:
        """Append conversations about one image; they share a shard unless they alone exceed a limit.

        Raises:
            ValueError: For a repeated key, an unsafe key or an unknown kind of image; nothing of the group is kept.
            UserError: If a shard has more samples, or the set more shards, than readers accept.
        """
        group = [(sample.key, members_of(sample)) for sample in samples]
        keys = [key for key, _ in group]
        if len(set(keys)) < len(keys) or not self._keys.isdisjoint(keys):
            twice = next(key for key in keys if key in self._keys or keys.count(key) > 1)
            raise ValueError(f"sample key {twice!r} comes twice; keys must be unique in a sample set")
        self._keys.update(keys)
        self._make_room([members for _, members in group])
        for key, members in group:
            self._make_room([members])
            if self._tar is None:
                self._tar = _Tar(self._out / f"samples-{len(self._entries):06d}.tar")
            self._tar.add(key, members)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_shard()
            LocalStore(self._out).write(INDEX_PATH, SampleIndex(shards=tuple(self._entries)).to_bytes())
        elif self._tar:
            self._tar.abandon()

    def _make_room(self, samples: Sequence[Sequence[Member]]) -> None:
        """Finish the shard if these samples would exceed its limits."""
        if self._tar:
            num_bytes = self._tar.num_bytes + sum(each.tar_bytes for members in samples for each in members) + len(_END)
            if len(self._tar.samples) + len(samples) > self._max_samples or num_bytes > self._max_bytes:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        tar, self._tar = self._tar, None
        try:
            entry = tar.finish()
        except BaseException:
            tar.abandon()
            raise
        self._index_bytes += len(entry.to_json()) + 1
        # Readers bound what they read: a set that nobody could open must not be finished.
        if self._index_bytes > MAX_INDEX_BYTES - BLOCK_BYTES:
            raise UserError(
                f"{self._out} would have more than {len(self._entries):,} shards, whose index has {MAX_INDEX_BYTES} "
                "bytes, the most that is read; pack more samples into a shard"
            )
        self._entries.append(entry)


class _Tar:
    """One tar being written beside its final name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}{PARTIAL}")
        self._file: BinaryIO = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.samples: list[SampleMembers] = []

    def add(self, key: str, members: list[Member]) -> None:
        """Append a sample."""
        spans = []
        crc32 = zlib.crc32(b"".join(member.data for member in members))
        for member in members:
            self._write(header(member.name, len(member.data)))
            spans.append((self.num_bytes, len(member.data)))
            self._write(member.data + bytes(padding(len(member.data))))
        self.samples.append(SampleMembers(key, tuple(spans), crc32))

    def finish(self) -> SampleShardEntry:
        """Close the tar, give it its name and write its table."""
        table = table_to_bytes(self.samples)
        if len(table) > MAX_TABLE_BYTES:
            raise UserError(
                f"{self._path} has {len(self.samples):,} samples, whose table has {len(table)} bytes, at most "
                f"{MAX_TABLE_BYTES} are read; pack fewer samples into a shard"
            )
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        entry = SampleShardEntry(
            name=self._path.name,
            num_samples=len(self.samples),
            bytes=self.num_bytes,
            sha256=self._digest.hexdigest(),
            table_bytes=len(table),
            table_sha256=hashlib.sha256(table).hexdigest(),
        )
        LocalStore(self._path.parent).write(entry.table_name, table)
        return entry

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
