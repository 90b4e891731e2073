"""Counts what an extraction has made, and shows how far it is."""

from collections import Counter
from collections.abc import Sequence

from pipeline.cluster.worker import Worker
from pipeline.extraction.shard_extractor import TEACHER_ONLY
from storage.progress import Progress, ProgressTask
from storage.samples.index import SampleIndex
from storage.targets.commits import CommitRecord


class ExtractionTally:
    """Sums over the shards that are stored, and how far each worker is; shown as it grows.

    Commit records are not kept: there may be 100,000.
    """

    def __init__(self, index: SampleIndex, missing: list[int], progress: Progress) -> None:
        self._index, self._progress = index, progress
        self.new_shards: set[int] = set()
        """Those that this run made."""
        self.max_workers = 0
        self.samples = self.new_samples = self.maps = self.turned = self.bytes = self.new_bytes = 0
        self.answer_tokens = self.cut_samples = self.cut_answer_tokens = 0
        self.skipped: Counter[str] = Counter()
        self._task = progress.task("extract", index.num_samples)
        num_missing = sum(index.shards[shard].num_samples for shard in missing)
        self._task.update(done=index.num_samples - num_missing, note="workers start")
        self._worker_tasks: dict[Worker, ProgressTask] = {}

    def advance(self, _: int, samples: int) -> None:
        """Shows samples that a worker observed; a negative number when a failed shard's are taken back."""
        self._task.advance(samples)

    def add(self, shard: int, record: CommitRecord | None) -> None:
        """Adds a shard that this run made; without a record nothing but `teacher/` was made."""
        if record is not None:
            self.new_shards.add(shard)
            self.new_samples += record.num_samples
            self.new_bytes += stored_bytes(record)
            self.count(record)

    def count(self, record: CommitRecord) -> None:
        """Adds a shard of the store, whoever made it."""
        self.samples += record.num_samples
        self.maps += record.num_maps
        self.turned += record.num_turned
        self.answer_tokens += record.num_answer_rows
        self.cut_samples += record.num_cut_samples
        self.cut_answer_tokens += record.num_cut_answer_tokens
        self.bytes += stored_bytes(record)
        self.skipped.update(sample.reason for sample in record.skipped)

    def show(self, workers: Sequence[Worker]) -> None:
        """Shows what each worker is at."""
        ready = [worker for worker in workers if worker.ready_at is not None]
        self.max_workers = max(self.max_workers, len(ready))
        for worker in self._worker_tasks.keys() - ready:
            self._worker_tasks.pop(worker).remove()
        for worker in ready:
            if worker not in self._worker_tasks:
                self._worker_tasks[worker] = self._progress.task(f"{worker.node} {worker.pid}", detail=True)
            shards = [attempt.task for attempt in worker.attempts]
            self._worker_tasks[worker].update(
                done=sum(attempt.num_units for attempt in worker.attempts),
                total=sum(self._index.shards[shard].num_samples for shard in shards if shard != TEACHER_ONLY),
                rate=worker.rate,
                note=f"shard {', '.join(map(str, shards))}" if shards else "",
            )
        self._task.update(
            rate=sum(worker.rate for worker in ready),
            note=f"{len(ready)} workers, {len(self.new_shards):,} shards, {self.new_bytes / 1e6:,.1f} MB",
        )


def stored_bytes(record: CommitRecord) -> int:
    """Bytes of a committed shard."""
    return sum(size for size, _ in record.files.values())
