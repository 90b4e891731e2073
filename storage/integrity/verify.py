"""Checking a target store and its samples byte by byte; a fault is a finding, not the end."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

from storage.errors import UserError
from storage.integrity.check_samples import check_tars, written_samples
from storage.integrity.check_targets import TargetChecks
from storage.integrity.findings import VerifyReport
from storage.progress import SILENT, Progress
from storage.samples.index import INDEX_PATH
from storage.stores import open_store
from storage.targets.manifest import MANIFEST_PATH, Manifest


def verify(
    targets_url: str | Path,
    samples_url: str | Path | None = None,
    *,
    percent: float = 100.0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Read everything, or a share, and compare it with what was committed.

    Args:
        targets_url: The target store.
        samples_url: The sample set; when given, its digests and its agreement with the targets are checked.
        percent: Share of the shards that is read; they are drawn by `seed`. Manifest, records, `teacher/`, presence and
            sizes of all files are checked always.
        seed: Another one reads other shards.
        progress: Shows how many of these shards and of their tars are read.

    Raises:
        UserError: If the store has no manifest, or one of another format version: nothing to compare with.
        StoreUnavailable: If the store does not answer; nothing is known then.
    """
    if not 0 < percent <= 100:
        raise UserError(f"{percent} % of the shards cannot be read, give more than 0 and at most 100")
    task = progress.task("verify", unit="shards")
    run = TargetChecks(open_store(targets_url), task)
    sample_store = None if samples_url is None else open_store(samples_url)
    if not run.store.exists(MANIFEST_PATH):
        Manifest.load(run.store)
    samples = run.guarded("samples", INDEX_PATH, lambda: written_samples(sample_store)) if sample_store else None
    manifest = run.guarded("-", MANIFEST_PATH, lambda: Manifest.load(run.store), refuse=True)
    shards = run.load_shards()
    teacher = run.load_teacher()
    manifest = run.check_manifest(manifest, [*shards, *([teacher] if teacher else [])])
    if manifest:
        run.check_settings(manifest)
    num_tars = len(samples.index.shards) if samples else 0
    if manifest and samples:
        run.compare("samples", INDEX_PATH, samples.index.digest, manifest.fingerprint.samples)
        run.compare("samples", INDEX_PATH, f"{num_tars} shards", f"{manifest.num_shards} shards")
    num_planned = manifest.num_shards if manifest else len(run.committed)
    run.check_places(num_planned)
    if teacher:
        run.check_teacher(teacher)
    chosen = _drawn([record.shard for record in shards], percent, seed)
    tars = _drawn(range(num_tars), percent, seed)
    task.update(total=len(chosen) + len(tars))
    for record in shards:
        run.check_shard(manifest, record, samples, read=record.shard in chosen)
    if samples:
        check_tars(run, samples, tars)
    return VerifyReport(
        targets_url=run.store.url,
        samples_url=None if sample_store is None else sample_store.url,
        num_planned=num_planned,
        num_committed=len(run.committed),
        num_read=len(chosen),
        num_files=run.num_files,
        num_bytes=run.num_bytes,
        num_samples=run.num_samples,
        missing=tuple(number for number in range(num_planned) if number not in run.committed),
        findings=tuple(dict.fromkeys(run.findings)),
    )


def _drawn(items: Sequence[int], percent: float, seed: int) -> set[int]:
    count = math.ceil(len(items) * percent / 100)
    return set(random.Random(seed).sample(items, count))  # noqa: S311 - which shards, not a secret
