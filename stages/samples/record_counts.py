"""Counts what is said of the records that are used: keys left unread, records and ids that come again."""

import json
from collections import Counter
from hashlib import blake2b

from pydantic import Field

from stages.samples.layouts.fields import MAX_NAMES
from stages.samples.llava_record import LlavaRecord
from storage.strict_model import StrictModel

_OTHERS = "(others)"


class RecordCounts(StrictModel):
    """Of all records whose JSON can be used, also of those whose images cannot."""

    num_unread: dict[str, int] = Field(default_factory=dict)
    """Records that have a key which is not read, by key; before it stands what has it, as in `turn.`, `part.` and
    `image.`, if that is not the record itself."""
    num_repeated_records: int = 0
    """Records whose images and conversation are those of an earlier one."""
    num_repeated_ids: int = 0
    """Records with the id of an earlier one."""
    num_answers_dropped: int = 0
    """Records that began with an answer, which was left out."""
    num_placeholders_as_text: int = 0
    """Records without an image that have the word `<image>`, which is text in them."""


class RecordCounter:
    """Counts record after record; remembers eight bytes of each record and each id."""

    def __init__(self) -> None:
        self._unread: Counter[str] = Counter()
        self._records: set[int] = set()
        self._ids: set[int] = set()
        self._repeated_records = self._repeated_ids = self._answers_dropped = self._as_text = 0

    def add(self, record: LlavaRecord) -> None:
        """Counts one record that can be used."""
        for name in sorted(record.unread):
            self._unread[name if name in self._unread or len(self._unread) < MAX_NAMES else _OTHERS] += 1
        content = json.dumps([record.image_names, record.turns])
        self._repeated_records += _is_there(self._records, content)
        if record.has_own_id:
            self._repeated_ids += _is_there(self._ids, record.id)
        self._answers_dropped += record.dropped_answer
        self._as_text += record.has_placeholder_as_text

    def counts(self) -> RecordCounts:
        """What was counted, the most frequent key first."""
        return RecordCounts(
            num_unread=dict(sorted(self._unread.items(), key=lambda item: (-item[1], item[0]))),
            num_repeated_records=self._repeated_records,
            num_repeated_ids=self._repeated_ids,
            num_answers_dropped=self._answers_dropped,
            num_placeholders_as_text=self._as_text,
        )


def _is_there(known: set[int], text: str) -> bool:
    """Whether the text came before; it is remembered by its digest."""
    size = len(known)
    known.add(int.from_bytes(blake2b(text.encode(), digest_size=8).digest()))
    return len(known) == size
