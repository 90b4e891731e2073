"""What a check of a store found."""

from dataclasses import dataclass

Part = int | str
"""Number of a target shard, or `teacher`, the name of a tar, `samples`, or `-` for the store itself."""


@dataclass(frozen=True)
class Finding:
    """One fault: what is there, and what was committed."""

    part: Part
    file: str
    """Path in the shard's folder, or in the store."""
    found: str
    expected: str


@dataclass(frozen=True)
class VerifyReport:
    """What was read and what was wrong."""

    targets_url: str
    samples_url: str | None
    num_planned: int
    """Shards that a finished extraction has."""
    num_committed: int
    """Shards committed, and so checked; the others are unfinished work, not faults."""
    num_read: int
    """Target shards of which every byte was read; of the others, record, presence and sizes."""
    num_files: int
    num_bytes: int
    """Files read, and their bytes."""
    num_samples: int
    """Samples whose targets were decoded."""
    missing: tuple[int, ...]
    """Shards without a commit record."""
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte that was read, and every size, is what was committed."""
        return not self.findings
