"""The member table beside each tar, `samples-000000.json`: where in the tar each sample lies."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from storage.digests import parse_record
from storage.errors import CorruptData
from storage.samples.members import BLOCK_BYTES, MAX_MEMBER_BYTES, is_key

SAMPLES_VERSION = 2
"""Version of the sample set's layout, in the index and in every table; `FORMAT.md` has a paragraph for each."""
MAX_TABLE_BYTES = 256 * 2**20
"""Largest table that is read or written: that of a shard of about four million samples."""
MIN_ENTRY_BYTES = 16
"""No sample takes less of a table, so a table of that size bounds the samples of a tar."""


class SampleMembers(NamedTuple):
    """Where one sample lies in its tar."""

    key: str
    spans: tuple[tuple[int, int], ...]
    """(offset of the data, bytes) of each member in tar order: the JSON, then the images."""
    crc32: int
    """zlib.crc32 over the data of the members in this order; checked whenever the sample is read."""


_MEMBERS = TypeAdapter(tuple[SampleMembers, ...])


def table_to_bytes(members: Iterable[SampleMembers]) -> bytes:
    """The file's bytes."""
    fields = {"format_version": SAMPLES_VERSION, "members": list(members)}
    return json.dumps(fields, separators=(",", ":")).encode()


def parse_table(data: bytes, where: str, num_samples: int, tar_bytes: int) -> tuple[SampleMembers, ...]:
    """The samples of a tar of `tar_bytes` bytes, in its order.

    Raises:
        CorruptData: Unless `data` names `num_samples` samples whose members follow each other inside the tar.
        UserError: For another format version.
    """
    fields = parse_record(data, where, SAMPLES_VERSION, canonical=False)
    try:
        return _checked(fields, num_samples, tar_bytes)
    except ValueError as error:
        raise CorruptData(f"{where} is no table of a tar's members: {error}; pack the samples again") from error


def _checked(fields: dict[str, Any], num_samples: int, tar_bytes: int) -> tuple[SampleMembers, ...]:
    if fields.keys() != {"format_version", "members"}:
        raise ValueError(f"it has the fields {sorted(fields)}")
    members = _MEMBERS.validate_python(fields["members"])
    if len(members) != num_samples:
        raise ValueError(f"it lists {len(members)} samples, num_samples is {num_samples}")
    end = 0
    for key, spans, _ in members:
        if not is_key(key) or not spans:
            raise ValueError(f"it has a sample {key!r} with {len(spans)} members")
        for offset, num_bytes in spans:
            if num_bytes > MAX_MEMBER_BYTES:
                raise ValueError(f"member of {key} of {num_bytes} bytes, at most {MAX_MEMBER_BYTES}")
            if offset % BLOCK_BYTES or offset < end + BLOCK_BYTES or num_bytes < 0:
                raise ValueError(f"member of {key} at {offset} overlaps or is not aligned")
            end = offset + num_bytes
    if end > tar_bytes:
        raise ValueError(f"the tar has {tar_bytes} bytes, its members end at {end}")
    return members
