"""What every check shares: findings, counts, and the comparison of a folder's files with its record."""

import errno
from collections.abc import Callable, Mapping
from typing import TypeVar

from storage.errors import CorruptData, StoreUnavailable, UserError
from storage.integrity.findings import Finding, Part
from storage.progress import ProgressTask
from storage.stores import Store
from storage.stores.base import measure_files
from storage.targets.commits import Committed

_Result = TypeVar("_Result")
_DAMAGE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
"""Numbers of the system's errors that damage can cause."""


class Checks:
    """Counts and findings of one verification."""

    def __init__(self, store: Store, task: ProgressTask) -> None:
        self.store, self.task = store, task
        self.findings: list[Finding] = []
        self.num_files = self.num_bytes = self.num_samples = 0

    def fault(self, part: Part, file: str, found: str, expected: str) -> None:
        """One more finding."""
        self.findings.append(Finding(part, file, found, expected))

    def guarded(self, part: Part, file: str, action: Callable[[], _Result], *, refuse: bool = False) -> _Result | None:
        """The action's result; None and a finding if it meets damage, or a user's error that is not to be refused."""
        try:
            return action()
        except StoreUnavailable:
            raise
        except (UserError, OSError) as error:
            unknown = isinstance(error, OSError) and error.errno not in _DAMAGE
            if unknown or (refuse and isinstance(error, UserError) and not isinstance(error, CorruptData)):
                raise
            self.fault(part, file, str(error), "what was committed")
        return None

    def guarded_read(self, store: Store, part: Part, path: str, read: Callable[[Store], object]) -> None:
        """Give `read` a local store that holds `path` as it is stored now; damage that it meets is a finding."""

        def read_copy() -> None:
            with store.as_stored(path) as here:
                read(here)

        self.guarded(part, path, read_copy)

    def compare(self, part: Part, file: str, found: object, expected: object) -> bool:
        """A finding unless both are equal."""
        if found != expected:
            self.fault(part, file, str(found), str(expected))
        return found == expected

    def check_sizes(self, label: Part, record: Committed, stored: Mapping[str, int]) -> None:
        """Presence and size of a folder's files, and that there are no others."""
        below = f"{record.path}/"
        found = {path.removeprefix(below): size for path, size in stored.items() if path.startswith(below)}
        expected = {name: info.bytes for name, info in record.files.items()}
        for name in sorted(found.keys() | expected.keys()):
            self.compare(label, name, size_of(found, name), size_of(expected, name))

    def check_digests(self, label: Part, record: Committed, here: Store) -> None:
        """Sha256 of a folder's files; of other sizes `check_sizes` tells."""
        found = measure_files(here.local(record.path))
        self.num_files += len(found)
        self.num_bytes += sum(info.bytes for info in found.values())
        for name in sorted(record.files):
            if name not in found:
                # Sizes are those of links and special files, too.
                self.compare(label, name, size_of({}, name), f"{record.files[name].bytes} bytes")
            elif found[name].bytes == record.files[name].bytes:
                self.compare(label, name, f"sha256 {found[name].sha256}", f"sha256 {record.files[name].sha256}")


def size_of(stored: Mapping[str, int], path: str) -> str:
    """What a finding says of a file's size."""
    return f"{stored[path]} bytes" if path in stored else "no such file"
