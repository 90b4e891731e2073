"""Looks at the first records of a data file, so that a layout nobody reads is said at once."""

from itertools import islice
from pathlib import Path

from stages.samples.layouts.fields import CONVERSATION_KEYS, MAX_NAMES, READ_KEYS, shown_keys
from stages.samples.sources.data_file import EXPECTED, open_source
from stages.unusable_sample import UnusableSample
from storage.errors import UserError

_LOOKED_AT = 20


def check_layout(path: Path) -> None:
    """Refuses a data file in whose first records nothing is a conversation; it reads no more than these.

    Raises:
        UserError: If the file holds no records, or the first ones have no layout that is read; says what they have.
    """
    with open_source(path) as source:
        first = list(islice(source.scan(), _LOOKED_AT))
    if not first:
        raise UserError(f"{path} holds no records; expected LLaVA records")
    objects = [record for record in first if isinstance(record, dict)]
    if not objects:
        found = str(first[0]) if isinstance(first[0], UnusableSample) else f"a {type(first[0]).__name__}"
        what = f"none of the first {len(first)} records of {path} is a JSON object, the first is {found}"
        raise UserError(f"{what}; expected {EXPECTED}, of objects")
    if any(key in record for record in objects for key in CONVERSATION_KEYS):
        return
    keys = list(dict.fromkeys(str(key) for record in objects for key in record))
    found = ", ".join(map(shown_keys, keys[:MAX_NAMES])) or "none"
    raise UserError(
        f"the records of {path} have a layout that is not read. Keys found: {found}. Keys that are read: "
        f"{', '.join(READ_KEYS)}; one of {', '.join(CONVERSATION_KEYS)} must hold the turns. docs/data.md has an "
        "example of each layout; rename or convert the keys"
    )
