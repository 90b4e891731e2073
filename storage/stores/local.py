"""A store that is a local (or network-mounted) folder."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from storage.digests import file_sha256
from storage.errors import UserError
from storage.stores.base import PARTIAL, ExpectedFiles, relative_path


class LocalStore:
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

    def read(self, path: str) -> bytes:
        """All bytes of a file."""
        return self._at(path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether a file of this name exists."""
        return self._at(path).is_file()

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
        if target.exists():
            return False
        try:
            self._publish(target, data, lambda partial: os.link(partial, target))
        except FileExistsError:
            return False
        except PermissionError as error:
            raise UserError(
                f"the file system of {self.root} refused a hard link ({error}), which commits need; "
                "use a folder on another file system, or an object store"
            ) from error
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Sorted relative paths of the files below `prefix`."""
        top = self._at(prefix) if prefix else self.root
        found: list[str] = []
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if not name.endswith(PARTIAL)]
            base = Path(folder).relative_to(self.root)
            found += [(base / name).as_posix() for name in files if not name.endswith(PARTIAL)]
        return sorted(found)

    def local(self, path: str, expect: ExpectedFiles | None = None) -> Path:
        """The file or folder itself."""
        target = self._at(path)
        if not target.exists():
            raise FileNotFoundError(f"{target} does not exist")
        return target

    def staging(self, name: str) -> Path:
        """A new folder in the store itself, so that it can be renamed into place."""
        folder = _partial(self._at(name))
        folder.mkdir(parents=True)
        return folder

    def put_tree(self, local_dir: Path, path: str) -> None:
        """Fsync every file, then rename the folder into place."""
        target = self._at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if local_dir.stat().st_dev != target.parent.stat().st_dev:
            nearer = _partial(target)
            shutil.copytree(local_dir, nearer)
            shutil.rmtree(local_dir)
            local_dir = nearer
        for folder, _, files in os.walk(local_dir):
            for name in files:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
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
        doomed = _partial(target)
        try:
            target.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)

    def remove_partials(self) -> int:
        """Remove every `.partial` file and folder in the store."""
        count = 0
        for folder, folders, files in os.walk(self.root):
            for name in [name for name in folders if name.endswith(PARTIAL)]:
                folders.remove(name)
                shutil.rmtree(Path(folder) / name)
                count += 1
            for name in files:
                if name.endswith(PARTIAL):
                    (Path(folder) / name).unlink(missing_ok=True)
                    count += 1
        return count

    def _at(self, path: str) -> Path:
        return self.root / relative_path(path)

    def _publish(self, target: Path, data: bytes, put_in_place: Callable[[Path], object]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial)
        finally:
            partial.unlink(missing_ok=True)
        _fsync(target.parent)


def _partial(target: Path) -> Path:
    # Unique, because two processes may write one target; the name never becomes part of what is stored.
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")


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
    if names != files(right):
        return False
    return all(file_sha256(left / name) == file_sha256(right / name) for name in names)
