"""The target store: what the teacher said of each sample, as one committed Zarr group a shard."""

from storage.records import MapTargets, SampleTargets, SkippedSample
from storage.targets.commits import CommitRecord, clean_partials, read_commits
from storage.targets.reader import TargetShard, TargetStore
from storage.targets.writer import write_shard

__all__ = [
    "CommitRecord",
    "MapTargets",
    "SampleTargets",
    "SkippedSample",
    "TargetShard",
    "TargetStore",
    "clean_partials",
    "read_commits",
    "write_shard",
]
