"""Groups records about the same images; a file holds the text of those behind the first, memory where it is."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from stages.samples.llava_record import LlavaRecord


@dataclass(slots=True)
class RecordGroup:
    """Records about the same images. A record without images is a group of its own."""

    first: int
    """Ordinal of its first record, whose images are those of all."""
    image_names: tuple[str, ...]
    others: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each record behind the first its ordinal, and where its text is: first byte and number of bytes."""

    def __len__(self) -> int:
        return 1 + len(self.others)


class RecordGroups:
    """Collects the groups of a data file, whose records come in order.

    Groups are in the order of their first records. So one more pass over the data finds these in order too, and no
    record has to be looked up in it, which compressed tables would have to decode again from far before it.

    Args:
        file: Empty, for the text of records behind the first of a group; their images are never in it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._groups: dict[tuple[str, ...] | int, RecordGroup] = {}
        self.num_records = 0

    def __iter__(self) -> Iterator[RecordGroup]:
        return iter(self._groups.values())

    def add(self, ordinal: int, record: LlavaRecord) -> None:
        """Puts a record into its group."""
        self.num_records += 1
        names = record.image_names
        group = self._groups.setdefault(names or ordinal, RecordGroup(ordinal, names))
        if group.first != ordinal:
            text = json.dumps(record.as_json()).encode()
            group.others.append((ordinal, self._file.tell(), self._file.write(text)))

    def others(self, group: RecordGroup) -> Iterator[tuple[int, dict[str, Any]]]:
        """Ordinal and stored form of each record behind the first. Call it once all are added."""
        for ordinal, start, num_bytes in group.others:
            self._file.seek(start)
            yield ordinal, json.loads(self._file.read(num_bytes))
