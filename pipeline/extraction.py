"""Extraction: which shards are missing, who makes them, what came of it."""

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import FingerprintMismatch, TooManySkipped, UserError
from storage.manifest import Manifest, create_or_check
from storage.samples import SampleIndex, SampleShard
from storage.stores import Store, open_store
from storage.targets import CommitRecord, TargetStore, clean_partials, write_shard

if TYPE_CHECKING:
    from stages.teacher.identity import TeacherConfig

REPORT = "reports/extraction.json"


class ExtractConfig(BaseModel):
    """How extraction runs; none of it changes what is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_address: str | None = None
    """Address of a Ray cluster; None starts one on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Teachers that run side by side; None is one a GPU, or one a core without GPUs."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of one shard before it is given up and reported."""
    max_skipped_fraction: float = Field(default=0.0, ge=0, le=1)
    """Samples that may be unusable before the command fails; they are in the ledger either way."""


class ExtractionReport(BaseModel):
    """What a run of `cdp extract-teacher` did; saved in the store as `reports/extraction.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int
    shards_made_now: int
    samples: int
    skipped: dict[str, int]
    maps: int
    bytes: int
    seconds: float
    samples_per_s: float
    workers: int
    failures: dict[int, str]


class ExtractionProgress(Protocol):
    """What the command shows while shards are made."""

    def start(self, total_samples: int, done_samples: int, workers: int) -> None:
        """Before the first shard."""

    def advance(self, samples: int) -> None:
        """Samples observed since the last call."""

    def shard_done(self, stored_bytes: int) -> None:
        """A shard was committed."""


class ShardExtractor:
    """One worker: a teacher, loaded once, that makes and commits shards."""

    def __init__(self, teacher: "TeacherConfig", samples: str, targets: str, manifest: Manifest, threads: int) -> None:
        import torch

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

    def __call__(self, shard: int, progress: Callable[[int], None]) -> CommitRecord:
        """Observes and commits one shard."""
        from stages.teacher.observe import observe_shard

        entry = self.index.shards[shard]
        with SampleShard.open(self.samples, entry) as samples:
            seen = observe_shard(self.teacher, samples, progress)
        self.save_teacher_vision()
        return write_shard(self.targets, shard, self.manifest, entry.name, seen.samples, seen.maps, seen.skipped)

    def save_teacher_vision(self) -> None:
        """Writes `teacher/` before the first commit: a store with shards must be complete for students."""
        if self.targets.exists("teacher/config.json"):
            return
        staging = self.targets.staging("teacher")
        self.teacher.save_vision(staging)
        self.targets.put_tree(staging, "teacher")


def extract(
    teacher: "TeacherConfig",
    samples_url: str,
    targets_url: str,
    config: ExtractConfig,
    progress: ExtractionProgress | None = None,
) -> ExtractionReport:
    """Makes every shard that is not committed yet; running it again finishes the rest.

    Raises:
        FingerprintMismatch: the store was made by another teacher, from other data, or with other settings.
        TooManySkipped: more samples are unusable than allowed; all others are stored.
        UserError: a shard failed on every attempt; the others are stored.
    """
    from pipeline import ray_cluster
    from stages.teacher.identity import identify_teacher

    started = time.perf_counter()
    samples, targets = open_store(samples_url), open_store(targets_url)
    index = SampleIndex.load(samples)
    with ray_cluster.connect(config.ray_address) as cluster:
        identity = identify_teacher(teacher, on_gpu=cluster.gpus > 0)
        manifest = identity.manifest(index.digest, len(index.shards))
        create_or_check(targets, manifest)
        clean_partials(targets)
        committed = TargetStore.open(targets_url).commits
        missing = [shard for shard in range(len(index.shards)) if shard not in committed]
        workers = min(config.workers or cluster.gpus or cluster.cpus, max(len(missing), 1))
        if progress is not None:
            done = index.num_samples - sum(index.shards[shard].num_samples for shard in missing)
            progress.start(index.num_samples, done, workers)
        threads = max(1, cluster.cpus // workers) if not cluster.gpus else 0
        outcome = ray_cluster.run_tasks(
            partial(ShardExtractor, teacher, samples_url, targets_url, manifest, threads or (os.cpu_count() or 1)),
            missing,
            num_workers=workers,
            gpus_per_worker=1 if cluster.gpus else 0,
            max_attempts=config.max_attempts,
            on_progress=lambda _, amount: progress.advance(amount) if progress else None,
            on_result=lambda _, record: progress.shard_done(stored_bytes(record)) if progress else None,
        )
    return _conclude(targets, targets_url, config, outcome, workers, time.perf_counter() - started)


def stored_bytes(record: CommitRecord) -> int:
    """Bytes of a committed shard."""
    return sum(size for size, _ in record.files.values())


def _conclude(
    targets: Store,
    targets_url: str,
    config: ExtractConfig,
    outcome: "ray_cluster.Outcome",
    workers: int,
    seconds: float,
) -> ExtractionReport:
    store = TargetStore.open(targets_url)
    commits = store.commits.values()
    skipped = Counter(sample.reason for commit in commits for sample in commit.skipped)
    made = sum(record.num_samples for record in outcome.results.values())
    report = ExtractionReport(
        shards=len(commits),
        shards_made_now=len(outcome.results),
        samples=sum(commit.num_samples for commit in commits),
        skipped=dict(skipped),
        maps=sum(commit.num_maps for commit in commits),
        bytes=sum(stored_bytes(commit) for commit in commits),
        seconds=seconds,
        samples_per_s=made / seconds,
        workers=workers,
        failures=outcome.failures,
    )
    targets.write(REPORT, report.model_dump_json(indent=1).encode())
    if outcome.failures:
        lines = "\n".join(f"  shard {shard}: {why}" for shard, why in sorted(outcome.failures.items()))
        raise UserError(
            f"{len(outcome.failures)} of {store.manifest.num_shards} shards could not be made; the others are stored. "
            f"Run the same command again when the cause is mended:\n{lines}"
        )
    num_skipped = sum(skipped.values())
    total = num_skipped + report.samples
    if num_skipped > config.max_skipped_fraction * total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        raise TooManySkipped(
            f"{num_skipped} of {total} samples could not be used ({reasons}), allowed is a fraction of "
            f"{config.max_skipped_fraction}. They are named with their reasons in {targets_url}/commits/*.json; all "
            "others are stored. Accept them with --set extract.max_skipped_fraction=FRACTION"
        )
    return report


if TYPE_CHECKING:
    from pipeline import ray_cluster
