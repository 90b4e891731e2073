"""What a target store holds, from its manifest and commit records alone; no shard is opened."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.stores import open_store
from storage.targets.commits import read_store

_HALF_BYTES = 2
"""Raw sizes are those of 16-bit floats."""
_MAP_ARRAYS = ("map_", "window_")
"""What the names of arrays of maps begin with."""


@dataclass(frozen=True)
class StoreSummary:
    """Counts and sizes of a target store."""

    url: str
    num_planned: int
    """Shards of a finished extraction."""
    num_committed: int
    num_samples: int
    num_tokens: int
    num_answer_rows: int
    num_cut_samples: int
    num_cut_answer_tokens: int
    """Samples that lost answer tokens to `max_length`, and how many."""
    num_skipped: int
    skipped_by_reason: dict[str, int]
    num_maps: int
    """Stored maps, each of all captured layers."""
    num_map_references: int
    """Samples with a map: without sharing, so many would be stored."""
    map_bytes: int
    """On disk, of all arrays of maps."""
    sharing_ratio: float
    """Entries of the maps of every sample over those stored; 1 where no image comes twice after the same tokens."""
    array_bytes: dict[str, int]
    """Array name -> bytes on disk, its metadata included; `(group)` is the groups' own."""
    total_bytes: int
    raw_square_bytes: int
    """The maps of every sample as 16-bit squares, not shared."""
    raw_triangle_bytes: int
    """The same as lower triangles."""
    raw_logit_bytes: int
    """16-bit logits of the whole vocabulary at the answer rows."""
    fingerprint_digest: str
    fingerprint: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Raw squares and logits over what is stored; 0 for an empty store."""
        return _over(self.raw_square_bytes + self.raw_logit_bytes, self.total_bytes)

    @property
    def shared_bytes(self) -> int:
        """What the maps would take more if each sample had its own, at the stored maps' bytes an entry."""
        return round(self.map_bytes * (self.sharing_ratio - 1))

    @property
    def map_square_ratio(self) -> float:
        """Raw squares over the stored maps; 0 without any."""
        return _over(self.raw_square_bytes, self.map_bytes if self.num_maps else 0)

    @property
    def map_triangle_ratio(self) -> float:
        """Raw triangles over the stored maps; 0 without any."""
        return _over(self.raw_triangle_bytes, self.map_bytes if self.num_maps else 0)


def summarize(targets_url: str | Path) -> StoreSummary:
    """Add up the commit records of a store.

    Raises:
        UserError, CorruptData, FingerprintMismatch: As `read_store`.
    """
    store = open_store(targets_url)
    manifest, commits = read_store(store)
    records = commits.values()
    array_bytes: Counter[str] = Counter()
    for record in records:
        for path, info in record.files.items():
            name, _, below = path.partition("/")
            array_bytes[name if below else "(group)"] += info.bytes
    reasons = Counter(sample.reason for record in records for sample in record.skipped)
    num_layers = len(manifest.fingerprint.layers)
    squares = sum(record.num_referenced_squares for record in records)
    # N(N+1)/2 entries of a causal map.
    triangles = (squares + sum(record.num_referenced_tokens for record in records)) // 2
    stored_squares = sum(record.num_map_squares for record in records)
    stored_triangles = (stored_squares + sum(record.num_map_tokens for record in records)) // 2
    causal = manifest.fingerprint.map_codec.causal
    entries, stored_entries = (triangles, stored_triangles) if causal else (squares, stored_squares)
    num_answer_rows = sum(record.num_answer_rows for record in records)
    return StoreSummary(
        url=store.url,
        num_planned=manifest.num_shards,
        num_committed=len(records),
        num_samples=sum(record.num_samples for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_answer_rows=num_answer_rows,
        num_cut_samples=sum(record.num_cut_samples for record in records),
        num_cut_answer_tokens=sum(record.num_cut_answer_tokens for record in records),
        num_skipped=reasons.total(),
        skipped_by_reason=dict(sorted(reasons.items())),
        num_maps=sum(record.num_maps for record in records),
        num_map_references=sum(record.num_map_references for record in records),
        map_bytes=sum(size for name, size in array_bytes.items() if name.startswith(_MAP_ARRAYS)),
        sharing_ratio=entries / stored_entries if stored_entries else 1.0,
        array_bytes=dict(sorted(array_bytes.items())),
        total_bytes=array_bytes.total(),
        raw_square_bytes=squares * num_layers * _HALF_BYTES,
        raw_triangle_bytes=triangles * num_layers * _HALF_BYTES,
        raw_logit_bytes=num_answer_rows * manifest.vocab_size * _HALF_BYTES,
        fingerprint_digest=manifest.fingerprint.digest,
        fingerprint=manifest.fingerprint.model_dump(mode="json"),
    )


def _over(raw: int, stored: int) -> float:
    return raw / stored if stored else 0.0
