"""An output folder that appears complete or not at all, and is never mixed from two data sets."""

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from storage.digests import parse_object
from storage.errors import UserError
from storage.regular_files import read_regular, refuse_unusable
from storage.samples.index import MAX_INDEX_BYTES
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

    def refuse_other_limits(self, max_samples_per_shard: int, max_shard_bytes: int) -> None:
        """Refuses shards of another size than those of a finished data set, if its report has their limits.

        Raises:
            UserError: If they have others; says how to pack the same shards again.
        """
        limits = {"max_samples_per_shard": max_samples_per_shard, "max_shard_bytes": max_shard_bytes}
        report: dict[str, Any] = {}
        # Without it the shards are compared when all are there.
        with suppress(FileNotFoundError, UserError):
            report = parse_object(read_regular(self.out / REPORT), str(self.out / REPORT), "pack again")
        former = {name: report.get(name, limit) for name, limit in limits.items()}
        if self.holds_index and former != limits:
            raise UserError(
                f"{self.out} already holds shards of at most {former['max_samples_per_shard']} samples and "
                f"{former['max_shard_bytes']} bytes, now {max_samples_per_shard} and {max_shard_bytes}, and targets "
                "belong to shards; pack into a new folder, or with the former --samples-per-shard and --shard-bytes"
            )

    def publish(self) -> None:
        """Move everything to `out`.

        Raises:
            UserError: If `out` holds another data set; nothing is changed.
        """
        # The index has every shard's sha256: equal indices, equal data. Moving then also mends lost shards.
        if self.holds_index and _index_of(self.out) != _index_of(self.path):
            found = f"{self.out} already holds another data set, or this one in other shards ({INDEX} differs)"
            raise UserError(f"{found}; pack into a new folder, or remove it")
        for path in sorted(self.path.iterdir(), key=lambda path: (path.name == INDEX, path.name)):
            path.replace(self.out / path.name)

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


def _index_of(folder: Path) -> bytes:
    return read_regular(folder / INDEX, MAX_INDEX_BYTES)
