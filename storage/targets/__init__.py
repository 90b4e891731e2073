"""The target store: what the teacher said of each sample, as one committed Zarr group a shard."""

from storage.sample_targets import MapTargets, SampleTargets, SkippedSample
from storage.targets.cleaning import clean_partials
from storage.targets.commits import CommitRecord, read_commits
from storage.targets.reader import TargetShard, TargetStore
from storage.targets.teacher import has_teacher, save_teacher, teacher_folder
from storage.targets.writer import write_shard

__all__ = [
    "CommitRecord",
    "MapTargets",
    "SampleTargets",
    "SkippedSample",
    "TargetShard",
    "TargetStore",
    "clean_partials",
    "has_teacher",
    "read_commits",
    "save_teacher",
    "teacher_folder",
    "write_shard",
]
