"""Extraction: which shards are missing, who makes them, what came of it."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.cluster.task_queue import FailedTry
from pipeline.cluster.worker import Outcome, Worker
from pipeline.interruption import RESUME, Interrupted, raised_on
from pipeline.shard_extractor import TEACHER_ONLY, ShardExtractor
from storage.errors import TooManySkipped, UserError
from storage.progress import SILENT, Progress, ProgressTask
from storage.samples.index import SampleIndex
from storage.stores import Store, open_store
from storage.strict_model import StrictModel
from storage.targets.cleaning import clean_partials
from storage.targets.commits import COMMITS, CommitRecord, committed_shards, iter_commits
from storage.targets.manifest import Manifest, create_or_check
from storage.targets.teacher import has_teacher

if TYPE_CHECKING:
    from stages.teacher.identity import TeacherConfig

REPORT, RUN_FILE = "reports/extraction.json", "reports/run.yaml"
SHOWN_FAILURES = 20
SHARDS_IN_FLIGHT = 2
"""Shards a worker has at once, each in a thread that calls its `ShardExtractor`."""


class ExtractConfig(StrictModel):
    """How extraction runs; none of it changes what is stored."""

    ray_address: str | None = None
    """Address of a Ray cluster; None starts one on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Most teachers that run side by side; None is one a GPU, or one a core without GPUs, that the cluster has at the
    time, so that nodes that join are used."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of one shard before it is given up and reported."""
    max_skipped_fraction: float = Field(default=0.0, ge=0, le=1)
    """Samples that may be unusable before the command fails; they are in the ledger either way."""


class WorkerReport(StrictModel):
    """One worker of a run: a process with a teacher in it."""

    node: str
    pid: int
    shards: int
    samples: int
    seconds: float
    """From the moment its teacher was loaded."""
    samples_per_s: float
    failed_tries: int
    timings: dict[str, float]
    """Seconds, by what it spent them on; as it says itself, so empty for one that died before its first shard."""
    waited_share: float | None
    """Part of the time since its first forward pass in which its teacher stood idle; None before that."""
    ended: str
    """Why it ended."""


class ExtractionReport(StrictModel):
    """What a run of `cdp extract-teacher` did; saved in the store as `reports/extraction.json`."""

    shards: int
    shards_made_now: int
    samples: int
    skipped: dict[str, int]
    maps: int
    bytes: int
    seconds: float
    samples_per_s: float
    workers: int
    """The most that worked at one time."""
    per_worker: tuple[WorkerReport, ...]
    """Every worker that ever was, those that died included."""
    failed_starts: dict[str, int]
    """Why workers did not start, and where -> how many times; such as a node that joined with another teacher on it."""
    failed_tries: dict[int, tuple[FailedTry, ...]]
    """Shard -> each try of it that failed, where and why; shards that succeeded later are among them."""
    failures: dict[int, str]
    """Shard given up -> its last error."""
    notes: tuple[str, ...] = ()
    """What students will not learn from these targets; said before the first shard, too."""


def extract(
    teacher: "TeacherConfig",
    samples_url: str,
    targets_url: str,
    config: ExtractConfig,
    progress: Progress = SILENT,
    on_begin: Callable[[Store], None] = lambda _: None,
) -> ExtractionReport:
    """Makes every shard that is not committed yet; running it again finishes the rest.

    Args:
        teacher: which teacher, and what is kept of what it sees.
        samples_url: sample shards.
        targets_url: target store.
        config: how it runs.
        progress: shows all samples, and what each worker does.
        on_begin: called with the target store once it is known to be of this teacher and these samples.

    Raises:
        FingerprintMismatch: the store was made by another teacher, from other data, or with other settings.
        TooManySkipped: more samples are unusable than allowed; all others are stored.
        UserError: a shard failed on every attempt; the others are stored.
        Interrupted: Ctrl-C or SIGTERM; says how many shards are stored. No worker is left behind.
    """
    from pipeline.cluster import ray_backend
    from stages.teacher.identity import identify_teacher

    started = time.perf_counter()
    samples, targets = open_store(samples_url), open_store(targets_url)
    index = SampleIndex.load(samples)
    with ray_backend.connect(config.ray_address) as cluster:
        identity = identify_teacher(teacher, on_gpu=cluster.gpus > 0)
        manifest = identity.manifest(index.digest, len(index.shards))
        create_or_check(targets, manifest)
        on_begin(targets)
        clean_partials(targets)
        committed = committed_shards(targets.list(COMMITS))
        missing = [shard for shard in range(len(index.shards)) if shard not in committed]
        made = _Made(index, progress, identity.notes)
        made.start(missing)
        make_worker = partial(
            ShardExtractor,
            teacher,
            samples_url,
            targets_url,
            manifest,
            threads_of_each(cluster.cpus, cluster.gpus, config.workers, len(missing)),
        )
        try:
            # Here, because ray, too, installs a handler of SIGTERM when it starts.
            with raised_on(signal.SIGINT, signal.SIGTERM):
                outcome = ray_backend.run_tasks(
                    make_worker,
                    missing or ([] if has_teacher(targets) else [TEACHER_ONLY]),
                    num_workers=config.workers,
                    gpus_per_worker=1 if cluster.gpus else 0,
                    max_attempts=config.max_attempts,
                    tasks_per_worker=SHARDS_IN_FLIGHT,
                    on_progress=made.advance,
                    on_result=made.add,
                    on_workers=made.show,
                )
        except Interrupted as stop:
            stored = len(committed_shards(targets.list(COMMITS)))
            raise Interrupted(
                stop.signal_number,
                f"interrupted: {stored} of {len(index.shards)} shards are stored in {targets_url} "
                f"({stored - len(committed)} made now); {RESUME}",
            ) from None
    # What workers that died were writing, and folders that another extraction was first to commit in place of.
    clean_partials(targets)
    return _conclude(targets, manifest, config, made, outcome, time.perf_counter() - started)


def threads_of_each(cpus: int, gpus: int, workers: int | None, num_shards: int) -> int:
    """Threads of each worker: its share of its machine's cores."""
    side_by_side = gpus or min(workers or cpus, max(num_shards, 1))
    return max(1, cpus // side_by_side)


class _Made:
    """What a run has made so far, and how far each worker is, shown as it grows.

    Of a commit record only sums are kept: there may be 100,000.
    """

    def __init__(self, index: SampleIndex, progress: Progress, notes: tuple[str, ...]) -> None:
        self._index, self._progress, self.notes = index, progress, notes
        self.made: set[int] = set()
        self.most_workers = 0
        self.samples = self.made_samples = self.maps = self.bytes = self.made_bytes = 0
        self.skipped: Counter[str] = Counter()
        self._task = progress.task("extract", index.num_samples)
        self._worker_tasks: dict[Worker, ProgressTask] = {}

    def start(self, missing: list[int]) -> None:
        for note in self.notes:
            self._progress.message(f"note: {note}")
        num_missing = sum(self._index.shards[shard].num_samples for shard in missing)
        self._task.update(done=self._index.num_samples - num_missing, note="workers start")

    def advance(self, _: int, samples: int) -> None:
        self._task.advance(samples)

    def add(self, shard: int, record: CommitRecord | None) -> None:
        """A shard made by this run; nothing but `teacher/` was, if there is no record."""
        if record is None:
            return
        self.made.add(shard)
        self.made_samples += record.num_samples
        self.made_bytes += stored_bytes(record)
        self.count(record)

    def count(self, record: CommitRecord) -> None:
        """A shard of the store, whoever made it."""
        self.samples += record.num_samples
        self.maps += record.num_maps
        self.bytes += stored_bytes(record)
        self.skipped.update(sample.reason for sample in record.skipped)

    def show(self, workers: Sequence[Worker]) -> None:
        ready = [worker for worker in workers if worker.ready_at is not None]
        self.most_workers = max(self.most_workers, len(ready))
        for worker in [worker for worker in self._worker_tasks if worker not in ready]:
            self._worker_tasks.pop(worker).remove()
        for worker in ready:
            if worker not in self._worker_tasks:
                self._worker_tasks[worker] = self._progress.task(f"{worker.node} {worker.pid}", detail=True)
            self._worker_tasks[worker].update(
                done=sum(worker.in_flight.values()),
                total=sum(self._index.shards[shard].num_samples for shard in worker.in_flight if shard >= 0),
                rate=worker.rate,
                note=f"shard {', '.join(map(str, worker.in_flight))}" if worker.in_flight else "",
            )
        self._task.update(
            rate=sum(worker.rate for worker in ready),
            note=f"{len(ready)} workers, {len(self.made):,} shards, {self.made_bytes / 1e6:,.1f} MB",
        )


def stored_bytes(record: CommitRecord) -> int:
    """Bytes of a committed shard."""
    return sum(size for size, _ in record.files.values())


def _conclude(
    targets: Store,
    manifest: Manifest,
    config: ExtractConfig,
    made: _Made,
    outcome: Outcome,
    seconds: float,
) -> ExtractionReport:
    committed = committed_shards(targets.list(COMMITS))
    earlier = {shard: path for shard, path in committed.items() if shard not in made.made}
    for record in iter_commits(targets, earlier):
        made.count(record)
    report = ExtractionReport(
        shards=len(committed),
        shards_made_now=len(made.made),
        samples=made.samples,
        skipped=dict(made.skipped),
        maps=made.maps,
        bytes=made.bytes,
        seconds=seconds,
        samples_per_s=made.made_samples / seconds,
        workers=made.most_workers,
        per_worker=tuple(_worker_report(worker) for worker in outcome.workers),
        failed_starts=outcome.failed_starts,
        failed_tries={shard: tuple(tries) for shard, tries in sorted(outcome.tries.items())},
        failures=outcome.failures,
        notes=made.notes,
    )
    targets.write(REPORT, report.model_dump_json(indent=1).encode())
    if outcome.failures:
        shown = sorted(outcome.failures.items())
        lines = [f"  shard {shard}: {why}" for shard, why in shown[:SHOWN_FAILURES]]
        if len(shown) > SHOWN_FAILURES:
            lines.append(f"  and {len(shown) - SHOWN_FAILURES} more")
        raise UserError(
            f"{len(outcome.failures)} of {manifest.num_shards} shards could not be made; the others are stored. "
            f"Every try is in {targets.url}/{REPORT}. "
            "Run the same command again when the cause is mended:\n" + "\n".join(lines)
        )
    num_skipped = sum(made.skipped.values())
    total = num_skipped + report.samples
    if num_skipped > config.max_skipped_fraction * total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in made.skipped.most_common())
        raise TooManySkipped(
            f"{num_skipped} of {total} samples could not be used ({reasons}), allowed is a fraction of "
            f"{config.max_skipped_fraction}. They are named with their reasons in {targets.url}/commits/*.json; all "
            "others are stored. Accept them with --set extract.max_skipped_fraction=FRACTION"
        )
    return report


def _worker_report(worker: Worker) -> WorkerReport:
    from stages.teacher.timings import waited_share

    return WorkerReport(
        node=worker.node,
        pid=worker.pid,
        shards=worker.num_tasks,
        samples=worker.num_units,
        seconds=worker.seconds,
        samples_per_s=worker.num_units / max(worker.seconds, 1e-9),
        failed_tries=worker.num_failures,
        timings=worker.timings,
        waited_share=waited_share(worker.timings),
        ended=worker.ended,
    )
