"""Checking a target store and its samples byte by byte; a fault is a finding, not the end."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from storage.errors import UserError
from storage.integrity.check_samples import SampleChecks, written_index
from storage.integrity.check_targets import TargetChecks
from storage.integrity.checks import Progress
from storage.integrity.findings import VerifyReport
from storage.stores import open_store
from storage.targets.commits import committed_shards
from storage.targets.manifest import MANIFEST_PATH, Manifest

_Item = TypeVar("_Item")


def verify(
    targets_url: str | Path,
    samples_url: str | Path | None = None,
    progress: Progress | None = None,
    *,
    percent: float = 100.0,
    seed: int = 0,
) -> VerifyReport:
    """Read everything, or a share, and compare it with what was committed.

    Args:
        targets_url: The target store.
        samples_url: The sample set; when given, its digests and its agreement with the targets are checked.
        progress: Called after each shard that is read.
        percent: Share of the shards that is read; they are drawn by `seed`. Manifest, records, `teacher/`, presence and
            sizes of all files are checked always.
        seed: Another one reads other shards.

    Raises:
        UserError: If the store has no manifest, or one of another format version: nothing to compare with.
        StoreUnavailable: If the store does not answer; nothing is known then.
    """
    if not 0 < percent <= 100:
        raise UserError(f"{percent} % of the shards cannot be read, give more than 0 and at most 100")
    run = TargetChecks(open_store(targets_url), progress)
    samples = None if samples_url is None else open_store(samples_url)
    if not run.store.exists(MANIFEST_PATH):
        Manifest.load(run.store)
    index = run.guarded("samples", "index.json", lambda: written_index(samples)) if samples else None
    manifest = run.guarded("-", MANIFEST_PATH, lambda: Manifest.load(run.store), refuse=True)
    stored = run.store.sizes()
    shards = run.load_shards(stored)
    teacher = run.load_teacher(stored)
    manifest = run.check_manifest(manifest, [*shards, *([teacher] if teacher else [])])
    if manifest and index:
        run.compare("samples", "index.json", index.digest, manifest.fingerprint.samples)
        run.compare("samples", "index.json", f"{len(index.shards)} shards", f"{manifest.num_shards} shards")
    committed = committed_shards(stored)
    num_planned = manifest.num_shards if manifest else len(committed)
    run.check_places(stored, num_planned)
    if teacher:
        run.check_teacher(teacher, stored)
    chosen = _drawn([record.shard for record in shards], percent, seed)
    tars = _drawn([entry.name for entry in index.shards] if index else [], percent, seed)
    run.num_to_do = len(chosen) + len(tars)
    for record in shards:
        run.check_shard(manifest, record, index, stored, read=record.shard in chosen)
    if index and samples:
        SampleChecks(run, samples).check_tars(index, tars)
    return VerifyReport(
        targets_url=run.store.url,
        samples_url=None if samples is None else samples.url,
        num_planned=num_planned,
        num_committed=len(committed),
        num_read=len(chosen),
        num_files=run.num_files,
        num_bytes=run.num_bytes,
        num_samples=run.num_samples,
        missing=tuple(sorted(set(range(num_planned)) - set(committed))),
        findings=tuple(dict.fromkeys(run.findings)),
    )


def _drawn(items: Sequence[_Item], percent: float, seed: int) -> set[_Item]:
    count = math.ceil(len(items) * percent / 100)
    return set(random.Random(seed).sample(items, count))  # noqa: S311 - which shards, not a secret
