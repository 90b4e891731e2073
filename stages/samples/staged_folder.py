"""An output folder that appears complete or not at all, and is never mixed from two data sets."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from storage.errors import CorruptData, UserError
from storage.regular_files import read_regular, refuse_unusable
from storage.samples.index import MAX_INDEX_BYTES
from storage.samples.sample_set import SampleSet
from storage.stores.folder_owner import LOCK_FILE, owned

INDEX = "index.json"
SHARDS = "samples-*.tar"
TABLES = "samples-*.json"
STAGING = "packing.partial"
LEDGER = "skipped.jsonl"
REPORT = "pack-report.json"


class StagedFolder:
    """Files are written into `path`, a folder inside `out`, and `publish` moves them to `out`, the index last.

    One process at a time packs into `out`.

    While `path` exists the packing has not ended; shards beside it without an index are left by a killed process.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / STAGING

    def __enter__(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file; name a folder to write sample shards to")
        refuse_unusable(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(owned(self.out))
            if not self.holds_index:
                self._clear_leftovers()
            self.path.mkdir(exist_ok=True)
            held.callback(shutil.rmtree, self.path)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def holds_index(self) -> bool:
        """Whether `out` already holds a finished data set."""
        return (self.out / INDEX).exists()

    @property
    def ledger_of_refusal(self) -> Path:
        """Where a refused run leaves its ledger: it never replaces the one of a finished data set."""
        return self.out / ("skipped.refused.jsonl" if self.holds_index else LEDGER)

    def publish(self) -> None:
        """Move everything to `out`.

        Raises:
            UserError: If `out` holds another data set; nothing is changed.
        """
        # The index has every shard's sha256: equal indices, equal data. Moving then also mends lost shards.
        if self.holds_index and _index_of(self.out) != _index_of(self.path):
            raise UserError(f"{self.out} already holds {self._difference()}; pack into a new folder, or remove it")
        for path in sorted(self.path.iterdir(), key=lambda path: (path.name == INDEX, path.name)):
            path.replace(self.out / path.name)

    def _difference(self) -> str:
        """What the finished data set in `out` is, beside the one that was packed now."""
        there, here = SampleSet.open(self.out), SampleSet.open(self.path)
        try:
            same = _contents(there) == _contents(here)
        except CorruptData:
            same = False
        if not same:
            return f"another data set ({INDEX} differs)"
        return (
            f"these samples in shards of another size ({len(there.index.shards)}, now {len(here.index.shards)}), and "
            "targets belong to shards: to keep those, pack with the former --samples-per-shard and --shard-bytes"
        )

    def _clear_leftovers(self) -> None:
        leftovers = [*self.out.glob(SHARDS), *self.out.glob(TABLES)] if self.path.exists() else []
        known = {path.name for path in leftovers} | {STAGING, LEDGER, REPORT, LOCK_FILE}
        if foreign := sorted(path.name for path in self.out.iterdir() if path.name not in known):
            found = f"{self.out} holds files that are not of this data set ({', '.join(foreign[:5])})"
            raise UserError(f"{found}; name a new or empty folder")
        for path in leftovers:
            path.unlink()
        if self.path.exists():
            shutil.rmtree(self.path)


def _contents(samples: SampleSet) -> list[tuple[str, list[int], int]]:
    """Each sample's key, bytes of its members and checksum, whichever shard it is in."""
    members = (one for shard in range(len(samples.index.shards)) for one in samples.members(shard))
    return sorted((one.key, [size for _, size in one.spans], one.crc32) for one in members)


def _index_of(folder: Path) -> bytes:
    return read_regular(folder / INDEX, MAX_INDEX_BYTES)
