"""Removing what dead extractors left in a target store, while others may be at work in it."""

import re
from contextlib import suppress

from storage.stores import Store
from storage.targets.commits import COMMITS, SHARDS, CommitRecord, Committed
from storage.targets.teacher_assets import TEACHER, TEACHER_RECORD, TeacherRecord

_FOLDER = re.compile(rf"{SHARDS}/(?P<shard>[0-9]{{6,}})-[0-9a-f]{{16}}\.zarr|{TEACHER}/[0-9a-f]{{16}}")


def clean_partials(store: Store) -> int:
    """Remove what dead writers left, and tell how many files and folders that were.

    Safe while other extractors run: staging is removed only if its owner is dead (`storage.stores.owner`), and a
    folder only once another one was committed in its place, after which its writer can no longer commit it. A folder
    without any commit record is left alone, as its writer may be about to commit it.

    Costs the listing of the folders' names: none is looked into, and a record is read only where a shard has several.
    """
    # A folder got such a name once it was whole, see `publish`: nothing is written inside.
    count = store.remove_partials(is_whole=lambda folder: _FOLDER.fullmatch(folder) is not None)
    folders: dict[str, list[str]] = {}
    for path in (*store.folders(SHARDS), *store.folders(TEACHER)):
        if match := _FOLDER.fullmatch(path):
            record = f"{COMMITS}/{match['shard']}.json" if match["shard"] else TEACHER_RECORD
            folders.setdefault(record, []).append(path)
    for record_path, found in folders.items():
        if len(found) == 1:
            continue
        kind: type[Committed] = TeacherRecord if record_path == TEACHER_RECORD else CommitRecord
        with suppress(FileNotFoundError):
            lost = set(found) - {kind.load(store, record_path).path}
            for path in lost:
                store.remove_tree(path)
            count += len(lost)
    return count
