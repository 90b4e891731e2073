"""The ledger of skipped samples: each with its reason, and the refusal when there are too many."""

import json
import math
from collections import Counter
from pathlib import Path

from stages.unusable_sample import UnusableSample
from storage.errors import TooManySkipped
from storage.strict_model import StrictModel

NUM_EXAMPLES = 5


class SkippedRecord(StrictModel):
    """One line of the ledger."""

    ordinal: int
    """Number of the record in the source file, from 0."""
    id: str | None
    """The record's own id; null when the record is too broken to have one."""
    reason: str
    """A word of `stages.unusable_sample.Reason`."""
    detail: str


class Ledger:
    """Collects skipped samples while a data set is packed."""

    def __init__(self) -> None:
        self._skipped: list[SkippedRecord] = []

    def __len__(self) -> int:
        return len(self._skipped)

    def skip(self, ordinal: int, sample_id: str | None, why: UnusableSample) -> None:
        """Enters one sample."""
        self._skipped.append(SkippedRecord(ordinal=ordinal, id=sample_id, reason=why.reason, detail=why.detail))

    def num_by_reason(self) -> dict[str, int]:
        """Counts, most frequent reason first, then by name."""
        counts = Counter(skipped.reason for skipped in self._skipped)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def write(self, path: Path) -> None:
        """One JSON line a skipped sample, by ordinal; an empty file when nothing was skipped."""
        lines = [json.dumps(skipped.model_dump()) + "\n" for skipped in self._in_order()]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)

    def exceeds(self, num_records: int, max_fraction: float) -> bool:
        """Whether more than `max_fraction` of `num_records` were skipped."""
        return len(self._skipped) > max_fraction * num_records

    def refusal(self, num_records: int, max_fraction: float, path: Path) -> TooManySkipped:
        """The error to raise: counts by reason, first examples, where the ledger is, how to allow them."""
        counts = ", ".join(f"{reason} {num}" for reason, num in self.num_by_reason().items())
        examples = "".join(
            f"\n  record {skipped.ordinal} (id {skipped.id}): {skipped.reason}: {skipped.detail}"
            for skipped in self._in_order()[:NUM_EXAMPLES]
        )
        fraction = len(self._skipped) / num_records
        enough = math.ceil(fraction * 1e6) / 1e6
        way_out = f", or set max_skipped_fraction to at least {enough:.6f}" if fraction < 1 else ""
        return TooManySkipped(
            f"{len(self._skipped)} of {num_records} samples ({fraction:.4%}) cannot be used, "
            f"max_skipped_fraction is {max_fraction:.4%}; by reason: {counts}; first ones:{examples}\n"
            f"all of them are in {path}; mend the data{way_out}"
        )

    def _in_order(self) -> list[SkippedRecord]:
        return sorted(self._skipped, key=lambda skipped: skipped.ordinal)
