"""Moving broken parts to quarantine, so that the next extraction makes just them again; nothing is deleted."""

import json
import re
from dataclasses import asdict, dataclass

from storage.integrity.findings import Finding, VerifyReport
from storage.stores import Store, open_store
from storage.stores.base import is_inside
from storage.targets.commits import SHARDS, commit_path
from storage.targets.teacher_assets import TEACHER, TEACHER_RECORD

QUARANTINE = "quarantine"
_QUARANTINE_NUMBER = re.compile(rf"{QUARANTINE}/([0-9]{{4,}})/.*")


@dataclass(frozen=True)
class RepairReport:
    """What was moved to quarantine."""

    folder: str | None
    """Where in the store it lies now, with the findings in `findings.json`; None when nothing had to be."""
    moved: tuple[str, ...]
    """Records, folders and files, by their former paths."""
    left: tuple[Finding, ...]
    """Findings that no extraction mends: of the samples, or of shards that were not committed."""


def repair(report: VerifyReport) -> RepairReport:
    """Move each broken part that `verify` found to `quarantine/NUMBER/`: first its record, so that nobody reads it.

    No extraction may be running on the store: it could be about to commit a folder that is moved.
    """
    store = open_store(report.targets_url)
    paths = store.list()
    parts = {finding: _parts(finding, paths) for finding in report.findings}
    moved = tuple(dict.fromkeys(part for found in parts.values() for part in found))
    left = tuple(finding for finding, found in parts.items() if not found)
    if not moved:
        return RepairReport(None, (), left)
    reasons = {"findings": [asdict(finding) for finding in report.findings], "moved": moved}
    folder = _new_folder(store, paths, json.dumps(reasons, sort_keys=True).encode())
    for part in moved:
        store.move(part, f"{folder}/{part}")
    return RepairReport(folder, moved, left)


def _parts(finding: Finding, paths: list[str]) -> list[str]:
    """What must go for a finding to be mended by extracting again: records before folders."""
    if isinstance(finding.part, int):
        record = commit_path(finding.part)
        folder = re.compile(rf"{SHARDS}/{finding.part:06d}-[0-9a-f]{{16}}\.zarr(?=/)")
    elif finding.part == TEACHER:
        record, folder = TEACHER_RECORD, re.compile(rf"{TEACHER}(?=/)")
    else:
        # A store moves nothing by a name that is no path inside it, such as one with control characters.
        return [finding.file] if finding.part == "-" and finding.file in paths and is_inside(finding.file) else []
    if record not in paths:
        # Without a record nobody reads the folder, and whoever writes it may be about to commit it.
        return []
    folders = {match[0] for match in map(folder.match, paths) if match}
    return [record, *sorted(folders)]


def _new_folder(store: Store, paths: list[str], reasons: bytes) -> str:
    """The first free number, taken by creating its list of reasons."""
    number = max((int(match[1]) for match in map(_QUARANTINE_NUMBER.fullmatch, paths) if match), default=-1) + 1
    while True:
        folder = f"{QUARANTINE}/{number:04d}"
        if not store.exists(f"{folder}/findings.json") and store.create(f"{folder}/findings.json", reasons):
            return folder
        number += 1
