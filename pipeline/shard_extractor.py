"""One worker of an extraction: a teacher that makes and commits shards."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from storage.errors import FingerprintMismatch
from storage.manifest import Manifest
from storage.samples import SampleIndex, SampleShard
from storage.stores import open_store
from storage.targets import CommitRecord, has_teacher, save_teacher, write_shard
from storage.targets.commits import commit_path

if TYPE_CHECKING:
    from stages.teacher.identity import TeacherConfig

TEACHER_ONLY = -1
"""Task of a store whose shards are complete and whose `teacher/` was set aside by a repair."""


class ShardExtractor:
    """One worker: a teacher, loaded once, that makes and commits shards; two threads may each give it one.

    While the teacher runs on one shard, the last is written and the first samples of the next are made ready.
    """

    def __init__(self, teacher: "TeacherConfig", samples: str, targets: str, manifest: Manifest, threads: int) -> None:
        fix_order_of_sums()
        import torch

        from stages.teacher.observe import Observer
        from stages.teacher.teacher import load_teacher

        torch.set_num_threads(threads)
        self.samples, self.targets, self.manifest = open_store(samples), open_store(targets), manifest
        self.index = SampleIndex.load(self.samples)
        self.teacher = load_teacher(teacher)
        # A node may hold another version of the checkpoint under the same path.
        own = self.teacher.identity.manifest(self.index.digest, len(self.index.shards))
        if differing := own.fingerprint.differences(manifest.fingerprint):
            raise FingerprintMismatch(
                f"the worker on {os.uname().nodename} sees another teacher or data than the driver "
                f"(differs in: {', '.join(differing)}); give all machines the same files"
            )
        self.observer = Observer(self.teacher)
        self._saving_vision = threading.Lock()

    def __call__(self, shard: int, progress: Callable[[int], None]) -> CommitRecord | None:
        """Observes and commits one shard, unless another extraction has done so by now."""
        if shard == TEACHER_ONLY:
            with self._saving_vision:
                self.save_teacher_vision()
            return None
        entry = self.index.shards[shard]
        with contextlib.suppress(FileNotFoundError):
            committed = CommitRecord.load(self.targets, commit_path(shard))
            progress(entry.num_samples)
            return committed
        with SampleShard.open(self.samples, entry) as samples:
            seen = self.observer.observe(samples, progress)
        with self._saving_vision:
            self.save_teacher_vision()
        with self.observer.timings.measured("writing"):
            return write_shard(self.targets, shard, self.manifest, entry.name, seen.samples, seen.maps, seen.skipped)

    def timings(self) -> dict[str, float]:
        """Seconds so far, by what they went into: `forward`, `waited` (see `Timings`), and what went on beside it."""
        return self.observer.timings.seconds()

    def save_teacher_vision(self) -> None:
        """Writes `teacher/` before the first commit: a store with shards must be complete for students."""
        if has_teacher(self.targets):
            return
        staging = self.targets.staging("teacher")
        self.teacher.save_vision(staging)
        save_teacher(self.targets, self.manifest, staging)


def fix_order_of_sums() -> None:
    """Makes a matrix product on a CPU the same for any number of threads, and with it of workers.

    The library reads this when it first multiplies.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
