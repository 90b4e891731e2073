"""A store that is a local (or network-mounted) folder."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

from storage.digests import file_sha256
from storage.errors import CorruptData, UserError, disk_errors_named
from storage.stores.base import PARTIAL, ExpectedFiles, Store, relative_path
from storage.stores.owner import partial_path, remove_if_abandoned


class LocalStore(Store):
    """Files below one folder, each replaced or created in one atomic step after an fsync."""

    def __init__(self, root: Path) -> None:
        # Absolute, so that a worker with another working folder opens the same store.
        self.root = Path(root).expanduser().absolute()

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    @property
    def url(self) -> str:
        """The folder's absolute path."""
        return str(self.root)

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """All bytes of a file, once its size is known to be allowed."""
        file = self._at(path)
        with disk_errors_named(file):
            if max_bytes is not None and (found := file.stat().st_size) > max_bytes:
                raise CorruptData(f"{file} has {found} bytes, at most {max_bytes} are read; it is no file of ours")
            return file.read_bytes()

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
            UserError: On a file system without hard links, where no other step is atomic and exclusive at
            once.
        """
        target = self._at(path)

        def link(partial: Path) -> None:
            try:
                os.link(partial, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                raise UserError(
                    f"the file system of {self.root} refused a hard link ({error}), which commits need; "
                    "use a folder on another file system, or an object store"
                ) from error

        if not target.exists():
            try:
                self._publish(target, data, link)
            except FileExistsError:
                pass
            else:
                return True
        return self.read(path) == data

    def folders(self, prefix: str) -> list[str]:
        """Sorted relative paths of the folders directly in `prefix`."""
        top = self._at(prefix)
        with disk_errors_named(top):
            try:
                with os.scandir(top) as entries:
                    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
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

    def put_tree(self, local_dir: Path, path: str) -> None:
        """Fsync every file, then rename the folder into place; who may look into it may read its files."""
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
                    equal = _same_tree(local_dir, target)
                except FileNotFoundError:
                    # Another writer of this content lost its race and is removing it: the name is free in a moment.
                    continue
                if equal:
                    shutil.rmtree(local_dir)
                    return
                self.remove_tree(path)

    def remove_tree(self, path: str) -> None:
        """Rename the folder away first, so that no half of it is ever seen under its name."""
        target = self._at(path)
        if not target.is_dir():
            return
        doomed = partial_path(target)
        with disk_errors_named(target):
            try:
                target.rename(doomed)
            except FileNotFoundError:
                return
            shutil.rmtree(doomed)

    def remove_partials(self, is_whole: Callable[[str], bool] | None = None) -> int:
        """Remove every `.partial` file and folder in the store that nobody will finish."""
        count = 0
        skip = is_whole or (lambda _: False)
        with disk_errors_named(self.root):
            for folder, folders, files in os.walk(self.root):
                partial = [name for name in (*folders, *files) if name.endswith(PARTIAL)]
                base = "" if folder == str(self.root) else f"{Path(folder).relative_to(self.root).as_posix()}/"
                folders[:] = [name for name in folders if not name.endswith(PARTIAL) and not skip(base + name)]
                count += sum(remove_if_abandoned(Path(folder) / name) for name in partial)
        return count

    def _at(self, path: str) -> Path:
        return self.root / relative_path(path)

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
        for name in files:
            file = Path(folder) / name
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


def _same_tree(left: Path, right: Path) -> bool:
    def files(top: Path) -> dict[str, int]:
        return {p.relative_to(top).as_posix(): p.stat().st_size for p in top.rglob("*") if p.is_file()}

    names = files(left)
    return names == files(right) and all(file_sha256(left / name) == file_sha256(right / name) for name in names)
