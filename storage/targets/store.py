"""A target store as it was when opened: its manifest and its committed shards."""

import re
from pathlib import Path
from typing import Self

from storage.errors import UserError
from storage.stores import Store, open_store
from storage.targets.commits import CommitRecord, read_store
from storage.targets.manifest import Manifest
from storage.targets.shard_reader import TargetShard
from storage.targets.teacher_assets import teacher_folder


class TargetStore:
    """A target store as it was when opened: its manifest and its committed shards. May be sent to workers."""

    def __init__(self, store: Store, manifest: Manifest, commits: dict[int, CommitRecord]) -> None:
        self.store, self.manifest, self.commits = store, manifest, commits

    @classmethod
    def open(cls, url: str | Path | Store) -> Self:
        """Read the manifest and all commit records.

        Raises:
            UserError, CorruptData, FingerprintMismatch: As `read_store`.
        """
        store = open_store(url)
        return cls(store, *read_store(store))

    def teacher_folder(self) -> Path:
        """The teacher's files for students; errors as for `storage.targets.teacher_assets.teacher_folder`."""
        return teacher_folder(self.store, self.manifest)

    @property
    def num_samples(self) -> int:
        """Committed samples."""
        return sum(record.num_samples for record in self.commits.values())

    def find(self, name: str) -> tuple[int, int]:
        """Shard and row of the sample with a key, or with a number among all that have targets, from 0.

        A decimal number below the number of samples, without zeros before it, is a number. For a key, shards are opened
        one after the other until it is found.

        Raises:
            UserError: If there is no such sample; of a skipped one it says the reason.
            CorruptData: If a file of an opened shard is missing or damaged.
        """
        num_samples = self.num_samples
        if re.fullmatch("0|[1-9][0-9]{0,17}", name) and int(name) < num_samples:
            left = int(name)
            for number, record in self.commits.items():
                if left < record.num_samples:
                    return number, left
                left -= record.num_samples
        for skipped in (each for record in self.commits.values() for each in record.skipped if each.key == name):
            why = f"sample {name} has no targets: {skipped.reason}: {skipped.detail}"
            raise UserError(f"{why}; choose another one")
        for number in self.commits:
            if name in (keys := self.shard(number).keys):
                return number, keys.index(name)
        raise UserError(
            f"{self.store.url} has no sample {name!r:.80} among its {num_samples}; give a key, as ledgers name "
            "samples, or a number from 0"
        )

    def shard(self, index: int) -> TargetShard:
        """Open a committed shard.

        Raises:
            UserError: If it was not committed.
            CorruptData: If a file of it is missing or damaged.
        """
        if index not in self.commits:
            raise UserError(
                f"shard {index} of {self.store.url} is not committed (it has {len(self.commits)} of "
                f"{self.manifest.num_shards}); run `cdp extract-teacher` to finish it"
            )
        return TargetShard(self.store, self.manifest, self.commits[index])
