"""What lies at an address, for the error of a command to which something else was named there."""

from storage.errors import CorruptData, UserError
from storage.stores import LocalStore, Store

SAMPLE_SET, TARGET_STORE, CHECKPOINT, RUN = "a sample set", "a target store", "a model's checkpoint", "a training run"
FILE = "a file"
_SIGNS = {"manifest.json": TARGET_STORE, "index.json": SAMPLE_SET, "config.json": CHECKPOINT}
"""Files at the top of a folder by which it is known."""
_BELOW = {
    "*/stage.json": RUN,
    "*/*/stage.json": "a sweep of training runs",
    "result.json": "a suite's result",
    "*/result.json": "results of suites",
}
"""Files in a folder or below it by which it is known otherwise."""
_MADE_BY = {SAMPLE_SET: "cdp pack-samples", TARGET_STORE: "cdp extract-teacher"}


def what_lies_at(store: Store) -> str | None:
    """Says what it is, by the names of its files: one of the words above, or another phrase; None if nothing is there.

    An object store is asked for these files alone; whatever else it holds counts as nothing.
    """
    if isinstance(store, LocalStore):
        if not store.root.exists():
            return None
        if not store.root.is_dir():
            return FILE
    for sign, kind in _SIGNS.items():
        if store.exists(sign):
            return kind
    if not isinstance(store, LocalStore):
        return None
    for pattern, kind in _BELOW.items():
        if any(store.root.glob(pattern)):
            return kind
    return "a folder of other files" if any(store.root.iterdir()) else "an empty folder"


def read_sign(store: Store, name: str, max_bytes: int, kind: str) -> bytes:
    """The bytes of the file by which a sample set or a target store is known.

    Raises:
        UserError: If there is none; says what lies there instead, and what to do.
        CorruptData: If it is larger than `max_bytes`, or no regular file.
    """
    try:
        return store.read(name, max_bytes)
    except (FileNotFoundError, CorruptData) as error:
        found = what_lies_at(store)
        if isinstance(error, CorruptData) and found not in (None, FILE):
            raise
    is_not = f"{store.url} is no {kind.removeprefix('a ')} ({name} is absent)"
    if found is None:
        raise UserError(f"{is_not}: nothing is there; check the path, or run `{_MADE_BY[kind]}` to make it")
    if found in _MADE_BY:
        raise UserError(f"{is_not} but {found}; are samples and targets swapped?")
    raise UserError(f"{is_not} but {found}; name the folder that `{_MADE_BY[kind]}` made, or run it to the end")
