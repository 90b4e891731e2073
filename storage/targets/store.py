"""A target store as it was when opened: its manifest and its committed shards."""

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
