"""Runs an extraction: finds the shards that are missing, has them made on a cluster, writes the report."""

import signal
import time
from collections.abc import Callable, Container
from functools import partial
from typing import TYPE_CHECKING

from pipeline.extraction.config import ExtractConfig, threads_per_worker
from pipeline.extraction.report import REPORT, ExtractionReport, check_report, make_report
from pipeline.extraction.shard_extractor import TEACHER_ONLY, ShardExtractor
from pipeline.extraction.tally import ExtractionTally
from pipeline.runtime.interruption import RESUME, Interrupted, raised_on
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet
from storage.stores import Store, open_store
from storage.targets.cleaning import clean_partials
from storage.targets.commits import COMMITS, committed_shards, iter_commits
from storage.targets.manifest import MANIFEST_PATH, Manifest, create_or_check
from storage.targets.teacher_assets import TEACHER_RECORD

if TYPE_CHECKING:
    from pipeline.cluster.ray_backend import TaskLimits
    from stages.teacher.config import TeacherConfig
    from stages.teacher.identity import TeacherIdentity

SHARDS_IN_FLIGHT = 2
"""Shards a worker has at once, each in a thread that calls its `ShardExtractor`."""


def extract(
    teacher: "TeacherConfig",
    samples_url: str,
    targets_url: str,
    config: ExtractConfig,
    progress: Progress = SILENT,
    on_begin: Callable[[Store], None] = lambda _: None,
    images: ImageConfig = DEFAULT_IMAGES,
) -> ExtractionReport:
    """Makes every shard that is not committed yet; running it again finishes the rest.

    `on_begin` is called with the target store once it is known to be of this teacher and these samples. `images` says
    how the teacher is shown pictures.

    Raises:
        FingerprintMismatch: If the store was made by another teacher, from other data, or with other settings.
        TooManySkipped: If more samples are unusable than allowed; all others are stored.
        UserError: If no node of the cluster has `config.gpus_per_worker` GPUs; if the teacher cannot be split as
            `teacher.parallel` asks, or its template or processor takes none of the first samples; or if a shard failed
            on every attempt, the others are stored.
        Interrupted: On Ctrl-C or SIGTERM; says how many shards are stored. No worker is left behind.
    """
    from pipeline.cluster import connection, ray_backend
    from stages.teacher.config import ranks_of
    from stages.teacher.first_samples import check_first_samples
    from stages.teacher.identity import identify_teacher

    started = time.perf_counter()
    samples, targets = SampleSet.open(samples_url), open_store(targets_url)
    index = samples.index
    teacher = as_begun(teacher, targets)
    num_ranks = ranks_of(teacher, config.gpus_per_worker)
    check_first_samples(teacher, samples, num_ranks)
    with connection.connect(config.ray_address) as cluster:
        cluster.check_room(config.gpus_per_worker, num_ranks)
        identity = identify_teacher(teacher, images, on_gpu=cluster.gpus > 0, num_ranks=num_ranks)
        manifest = identity.manifest(index.digest, len(index.shards))
        create_or_check(targets, manifest)
        on_begin(targets)
        clean_partials(targets)
        committed = committed_shards(targets.list(COMMITS))
        missing = _missing_shards(targets, committed, len(index.shards))
        notes = (*identity.notes, *in_flight_notes(config, identity))
        for note in notes:
            progress.message(f"note: {note}")
        tally = ExtractionTally(index, missing, progress)
        cpus = max(cluster.cpus // num_ranks, 1)
        threads = threads_per_worker(cpus, cluster.gpus, config.workers, len(missing), config.gpus_per_worker)
        try:
            # Here, because ray, too, installs a handler of SIGTERM when it starts.
            with raised_on(signal.SIGINT, signal.SIGTERM):
                outcome = ray_backend.run_tasks(
                    partial(ShardExtractor, teacher, samples_url, targets_url, manifest, threads, config),
                    missing or ([] if targets.exists(TEACHER_RECORD) else [TEACHER_ONLY]),
                    _limits(config, num_ranks, has_gpus=cluster.gpus > 0),
                    on_progress=tally.advance,
                    on_result=tally.add,
                    on_workers=tally.show,
                )
        except Interrupted as stop:
            raise _interrupted(stop, targets, len(index.shards), len(committed)) from None
    # What workers that died were writing, and folders that another extraction was first to commit in place of.
    clean_partials(targets)
    committed = committed_shards(targets.list(COMMITS))
    for record in iter_commits(targets, {n: path for n, path in committed.items() if n not in tally.new_shards}):
        tally.count(record)
    seconds = time.perf_counter() - started
    report = make_report(config, len(committed), tally, outcome, notes, seconds, num_ranks)
    targets.write(REPORT, report.to_json().encode())
    check_report(report, config, targets.url, manifest.num_shards)
    return report


def _limits(config: ExtractConfig, num_ranks: int, *, has_gpus: bool) -> "TaskLimits":
    from pipeline.cluster.ray_backend import TaskLimits

    return TaskLimits(
        num_workers=config.workers,
        gpus_per_worker=config.gpus_per_worker if has_gpus else 0,
        max_attempts=config.max_attempts,
        tasks_per_worker=SHARDS_IN_FLIGHT,
        cpus_per_worker=1 if has_gpus else num_ranks,
    )


def as_begun(teacher: "TeacherConfig", targets: Store) -> "TeacherConfig":
    """The settings with `prefix_reuse` as a store has it that was begun already, unless they say how it must be.

    Raises:
        UserError, CorruptData: If what lies there is no manifest that this version reads.
    """
    if teacher.prefix_reuse != "auto" or not targets.exists(MANIFEST_PATH):
        return teacher
    is_reused = Manifest.load(targets).fingerprint.prefix_reuse
    return teacher.model_copy(update={"prefix_reuse": "on" if is_reused else "off"})


def in_flight_notes(config: ExtractConfig, teacher: "TeacherIdentity") -> tuple[str, ...]:
    """Why only one batch is in the teacher, where more were to be."""
    from stages.teacher.in_flight import why_one

    default = 1 if teacher.settings.parallel == "tensor" else config.gpus_per_worker
    why = None if (config.batches_in_flight or default) == 1 else why_one(teacher)
    return () if why is None else (f"one batch at a time is in the teacher: {why}",)


def _interrupted(stop: Interrupted, targets: Store, num_shards: int, num_before: int) -> Interrupted:
    """The same, saying how many shards are stored."""
    stored = len(committed_shards(targets.list(COMMITS)))
    found = f"{stored} of {num_shards} shards are stored in {targets.url} ({stored - num_before} made now)"
    return Interrupted(stop.signal_number, f"interrupted: {found}; {RESUME}")


def _missing_shards(targets: Store, committed: Container[int], num_shards: int) -> list[int]:
    """The shards to be made; refused if none could be committed, where a begun store was copied to."""
    if missing := [shard for shard in range(num_shards) if shard not in committed]:
        targets.check_create()
    return missing
