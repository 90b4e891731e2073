"""One worker of an extraction: a teacher that makes and commits shards."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.cluster.task_queue import CRASHES_AT_A_POSITION
from pipeline.cluster.worker import ProcessUnfit, ProgressMarker
from pipeline.extraction.config import ExtractConfig
from pipeline.runtime.cpu_determinism import make_cpu_deterministic, reproducible_threads
from storage.errors import FingerprintMismatch, disk_errors_named
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.stores import open_store
from storage.targets.commits import CommitRecord, commit_path
from storage.targets.manifest import Manifest
from storage.targets.shard_writer import write_shard
from storage.targets.teacher_assets import TEACHER_RECORD, save_teacher

if TYPE_CHECKING:
    from stages.teacher.config import TeacherConfig
    from stages.teacher.observe import ShardObservations

TEACHER_ONLY = -1
"""Task of a store whose shards are complete and whose `teacher/` was put into quarantine by a repair."""
NUM_CONTROLS = 4
"""Other shards whose first sample may show that a teacher works."""


class ShardExtractor:
    """A teacher, loaded once, that makes and commits shards; two threads may each give it one.

    While the teacher runs on one shard, the last is written and the first samples of the next are prepared.
    """

    def __init__(
        self,
        teacher: "TeacherConfig",
        samples: str,
        targets: str,
        manifest: Manifest,
        threads: int,
        config: ExtractConfig = ExtractConfig(),  # noqa: B008 a frozen value
    ) -> None:
        make_cpu_deterministic()
        import torch

        from stages.teacher.observe import Observer
        from stages.teacher.teacher import load_teacher

        torch.set_num_threads(threads if torch.cuda.is_available() else reproducible_threads(threads))
        self.samples, self.targets, self.manifest = SampleSet.open(samples), open_store(targets), manifest
        self.teacher = load_teacher(teacher, manifest.fingerprint.images, config.gpus_per_worker)
        # A node may hold another version of the checkpoint under the same path.
        own = self.teacher.identity.manifest(self.samples.index.digest, len(self.samples.index.shards))
        if differing := own.fingerprint.differences(manifest.fingerprint):
            raise FingerprintMismatch(
                f"the worker on {os.uname().nodename} sees another teacher or data than the driver "
                f"(differs in: {', '.join(differing)}); give all machines the same files"
            )
        self.observer = Observer(self.teacher, batches_in_flight=config.batches_in_flight)
        self._saving_vision = threading.Lock()

    def __call__(self, shard: int, progress: Callable[[int], None]) -> CommitRecord | None:
        """Observes and commits one shard, unless another extraction did so first."""
        return self._make(shard, progress, lambda samples: self.observer.observe(samples, progress))

    def run_isolated(self, shard: int, progress: Callable[[int], None], marker: ProgressMarker) -> CommitRecord | None:
        """Makes a shard that failed before, one sample after the other; those at fault are skipped with a reason.

        Raises:
            ProcessUnfit: If a sample left the teacher unusable.
        """
        from stages.teacher.isolate import NOWHERE, TeacherUnusable, run_isolated

        crashes = Counter(marker.crashes)
        crashing_rows = {row for row, count in crashes.items() if row != NOWHERE and count >= CRASHES_AT_A_POSITION}

        def observe(samples: SampleShard) -> "ShardObservations":
            with contextlib.ExitStack() as opened:
                return run_isolated(
                    self.teacher,
                    samples,
                    controls=self._controls(shard, crashes.total(), opened),
                    crashing_rows=crashing_rows,
                    at=marker.mark,
                    progress=progress,
                    timings=self.observer.timings,
                )

        try:
            return self._make(shard, progress, observe)
        except TeacherUnusable as error:
            raise ProcessUnfit(str(error)) from error

    def _make(
        self, shard: int, progress: Callable[[int], None], observe: "Callable[[SampleShard], ShardObservations]"
    ) -> CommitRecord | None:
        if shard == TEACHER_ONLY:
            self.save_teacher_vision()
            return None
        entry = self.samples.index.shards[shard]
        with contextlib.suppress(FileNotFoundError):
            committed = CommitRecord.load(self.targets, commit_path(shard))
            progress(entry.num_samples)
            return committed
        with self.samples.shard(shard) as samples:
            seen = observe(samples)
        self.save_teacher_vision()
        with self.observer.timings.measured("writing"):
            return write_shard(self.targets, shard, self.manifest, entry.name, seen.samples, seen.maps, seen.skipped)

    def _controls(self, shard: int, first: int, opened: contextlib.ExitStack) -> Iterator[tuple[SampleShard, int]]:
        """Samples that are not in doubt: of other shards, where there are any; other ones after each crash."""
        num_shards = len(self.samples.index.shards)
        if num_shards == 1:
            samples = opened.enter_context(self.samples.shard(shard))
            yield from ((samples, (first + number + 1) % len(samples)) for number in range(len(samples)))
            return
        for number in range(min(NUM_CONTROLS, num_shards - 1)):
            other = (shard + 1 + (first + number) % (num_shards - 1)) % num_shards
            yield opened.enter_context(self.samples.shard(other)), 0

    def timings(self) -> dict[str, float]:
        """Gives the seconds so far by what they went into, as `Timings` names it."""
        return self.observer.timings.seconds()

    def save_teacher_vision(self) -> None:
        """Writes `teacher/` before the first commit: a store with shards must be complete for students."""
        with self._saving_vision:
            if not self.targets.exists(TEACHER_RECORD):
                staging = self.targets.staging("teacher")
                with disk_errors_named(staging):
                    self.teacher.save_vision(staging)
                save_teacher(self.targets, self.manifest, staging)
