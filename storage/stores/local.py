"""A store that is a local (or network-mounted) folder."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

from storage.errors import NoHardLinks, UserError, disk_errors_named
from storage.regular_files import MAX_BYTES, home_expanded, read_regular, refuse_unusable
from storage.stores.base import PARTIAL, ExpectedFiles, Store, measure_files, relative_path
from storage.stores.owner import partial_path, remove_if_abandoned


class LocalStore(Store):
    """Files below one folder, each replaced or created in one atomic step after an fsync.

    Raises:
        UserError: If its path is not UTF-8.
    """

    def __init__(self, root: Path) -> None:
        # Absolute, so that a worker with another working folder opens the same store.
        self.root = home_expanded(root).absolute()
        refuse_unusable(self.root)
        self.url = str(self.root)

    def read(self, path: str, max_bytes: int = MAX_BYTES) -> bytes:
        """All bytes of a file, as `read_regular`."""
        return read_regular(self._at(path), max_bytes)

    def exists(self, path: str) -> bool:
        """Whether a file of this name exists."""
        file = self._at(path)
        with disk_errors_named(file):
            return file.is_file()

    def write(self, path: str, data: bytes) -> None:
        """Write beside the target, fsync, then replace the target."""
        target = self._at(path)
        self._publish(target, data, lambda partial: partial.replace(target))

    def create(self, path: str, data: bytes) -> bool:
        """Write beside the target, fsync, then hard-link it into place, which fails when the name is taken.

        Raises:
            NoHardLinks: On a file system without hard links, where no other step is both atomic and exclusive.
        """
        target = self._at(path)
        with suppress(FileExistsError):
            if not target.exists():
                self._publish(target, data, lambda partial: self._link(partial, target))
                return True
        return self.read(path) == data

    def check_create(self) -> None:
        """Hard-links a file, as `create` does.

        Raises:
            NoHardLinks: As `create`.
        """
        linked = partial_path(self.root / "link")
        try:
            self._publish(self.root / "linked", b"", lambda partial: self._link(partial, linked))
        finally:
            linked.unlink(missing_ok=True)

    def folders(self, prefix: str) -> list[str]:
        """Sorted relative paths of the folders directly in `prefix`."""
        top = self._at(prefix)
        names: list[str] = []
        with disk_errors_named(top), suppress(FileNotFoundError, NotADirectoryError), os.scandir(top) as entries:
            names += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(f"{prefix}/{name}" for name in names if not name.endswith(PARTIAL))

    def list(self, prefix: str = "") -> list[str]:
        """Sorted relative paths of the files below `prefix`."""
        top = self._at(prefix) if prefix else self.root
        found: list[str] = []
        with disk_errors_named(top):
            for folder, folders, files in os.walk(top, onerror=_unless_absent):
                folders[:] = [name for name in folders if not name.endswith(PARTIAL)]
                base = Path(folder).relative_to(self.root)
                found += [(base / name).as_posix() for name in files if not name.endswith(PARTIAL)]
        return sorted(found)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each file below `prefix`."""
        return {path: (self.root / path).lstat().st_size for path in self.list(prefix)}

    def local(self, path: str, expect: ExpectedFiles | None = None, holder: object | None = None) -> Path:
        """The file or folder itself."""
        target = self._at(path)
        with disk_errors_named(target):
            if not target.exists():
                raise FileNotFoundError(f"{target} does not exist")
        return target

    @contextmanager
    def as_stored(self, path: str) -> "Iterator[LocalStore]":
        """This store itself."""
        self.local(path)
        yield self

    def move(self, path: str, to: str) -> None:
        """Rename."""
        source, target = self._at(path), self._at(to)
        if not source.exists():
            return
        with disk_errors_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            _fsync(target.parent)
            _fsync(source.parent)

    def staging(self, name: str) -> Path:
        """A new folder in the store itself, so that it can be renamed into place."""
        folder = partial_path(self._at(name))
        with disk_errors_named(folder):
            folder.mkdir(parents=True)
        return folder

    def put_tree(self, local_dir: Path, path: str, *, replace: bool = True) -> None:
        """Fsync every file, then rename the folder into place; who may look into it may read its files.

        Raises:
            UserError: Without `replace`, if another folder is there that is not empty; it is left alone.
        """
        target = self._at(path)
        with disk_errors_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if local_dir.stat().st_dev != target.parent.stat().st_dev:
                nearer = partial_path(target)
                shutil.copytree(local_dir, nearer)
                shutil.rmtree(local_dir)
                local_dir = nearer
            _make_durable(local_dir)
            while True:
                try:
                    local_dir.rename(target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                else:
                    _fsync(target.parent)
                    return
                try:
                    equal = measure_files(local_dir) == measure_files(target)
                except FileNotFoundError:
                    # Another writer of this content lost its race and is removing it: the name is free in a moment.
                    continue
                if equal:
                    shutil.rmtree(local_dir)
                    return
                if not replace:
                    raise UserError(f"{target} holds something already; name a new folder")
                self.remove_tree(path)

    def remove_tree(self, path: str) -> None:
        """Rename the folder away first, so that no half of it is ever seen under its name."""
        target = self._at(path)
        doomed = partial_path(target)
        with disk_errors_named(target), suppress(FileNotFoundError):
            if target.is_dir():
                target.rename(doomed)
                shutil.rmtree(doomed)

    def remove_partials(self, is_whole: Callable[[str], bool] | None = None) -> int:
        """Remove every `.partial` file and folder in the store that nobody will finish."""
        count = 0
        skip = is_whole or (lambda _: False)
        with disk_errors_named(self.root):
            for folder, folders, files in os.walk(self.root):
                partial = [name for name in (*folders, *files) if name.endswith(PARTIAL)]
                base = Path(folder).relative_to(self.root)
                folders[:] = [name for name in folders if name not in partial and not skip((base / name).as_posix())]
                count += sum(remove_if_abandoned(Path(folder) / name) for name in partial)
        return count

    def _at(self, path: str) -> Path:
        return self.root / relative_path(path)

    def _link(self, partial: Path, target: Path) -> None:
        try:
            os.link(partial, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise NoHardLinks(
                f"the file system of {self.root} refused a hard link ({error}), which commits need; "
                "use a folder on another file system, or an object store"
            ) from error

    def _publish(self, target: Path, data: bytes, put_in_place: Callable[[Path], object]) -> None:
        partial = partial_path(target)
        with disk_errors_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                put_in_place(partial)
            finally:
                partial.unlink(missing_ok=True)
            _fsync(target.parent)


def _unless_absent(error: OSError) -> None:
    """A folder that cannot be listed must not look like an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_durable(top: Path) -> None:
    for folder, _, files in os.walk(top):
        readers = Path(folder).stat().st_mode & 0o444
        for file in (Path(folder) / name for name in files):
            # safetensors writes for the owner alone, whatever the umask.
            if readers & ~(mode := file.stat().st_mode):
                file.chmod(S_IMODE(mode) | readers)
            _fsync(file)
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
