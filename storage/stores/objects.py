"""A store that is a prefix of an object store, reached through obstore."""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.digests import digest_of, file_sha256
from storage.errors import CorruptData, UserError
from storage.stores.base import PARTIAL, ExpectedFiles, relative_path

SCHEMES = ("s3", "gs", "az", "memory")

_Object = tuple[str, int, str | None]
"""Path below the prefix, bytes, entity tag."""

_clients: dict[str, Any] = {}
_used_by: set[int] = set()
"""Process numbers that used obstore: a forked child inherits its parent's and must not go on."""


class ObjectStore:
    """Whole objects below `scheme://bucket/prefix`; credentials and endpoint come from the environment.

    What is read through `local` is kept in the cache folder (`CDP_CACHE_DIR`, by default
    `~/.cache/compodistill`), under a name made of the objects' sizes and entity tags, so that a replaced
    object is downloaded again.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/") if not url.endswith("://") else url
        scheme, _, rest = self._url.partition("://")
        bucket, _, prefix = rest.partition("/")
        self._bucket = f"{scheme}://{bucket}"
        self._prefix = f"{relative_path(prefix)}/" if prefix else ""

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    @property
    def url(self) -> str:
        """The address this store was opened with."""
        return self._url

    def read(self, path: str) -> bytes:
        """All bytes of an object."""
        obstore, client = self._connect()
        return bytes(obstore.get(client, self._key(path)).bytes())

    def exists(self, path: str) -> bool:
        """Whether an object of this name exists."""
        obstore, client = self._connect()
        try:
            obstore.head(client, self._key(path))
        except FileNotFoundError:
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """Put the object; object stores show it whole or not at all."""
        obstore, client = self._connect()
        obstore.put(client, self._key(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Put the object on condition that none has this name."""
        obstore, client = self._connect()
        try:
            obstore.put(client, self._key(path), data, mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Sorted relative paths of the objects below `prefix`."""
        return sorted(name for name, _, _ in self._objects(prefix) if PARTIAL not in name)

    def local(self, path: str, expect: ExpectedFiles | None = None) -> Path:
        """Download an object, or all objects below a folder, into the cache."""
        obstore, client = self._connect()
        objects = self._objects(relative_path(path))
        if not objects:
            try:
                meta = obstore.head(client, self._key(path))
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.url}/{path} does not exist") from None
            objects = [(path, meta["size"], meta["e_tag"])]
        entry = _cache_dir() / digest_of([self._bucket, self._key(path), objects])[:32]
        kept = entry / Path(path).name
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(f"{entry.name}.lock")):
            if kept.exists():
                return kept
            partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                for name, _, _ in objects:
                    target = partial / Path(path).name / name.removeprefix(path).lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        for chunk in obstore.get(client, self._key(name)).stream():
                            file.write(chunk)
                self._check_arrival(partial / kept.name, path, expect or {})
                partial.rename(entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return kept

    def staging(self, name: str) -> Path:
        """A new folder on this machine; `put_tree` uploads it."""
        folder = self._staging_dir()
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{Path(name).name}.", suffix=PARTIAL, dir=folder))

    def put_tree(self, local_dir: Path, path: str) -> None:
        """Upload every file, in sorted order; the folder is complete for readers when its commit names it."""
        obstore, client = self._connect()
        relative_path(path)
        for file in sorted(p for p in local_dir.rglob("*") if p.is_file()):
            obstore.put(client, self._key(f"{path}/{file.relative_to(local_dir).as_posix()}"), file)
        shutil.rmtree(local_dir)

    def remove_tree(self, path: str) -> None:
        """Delete every object below the folder."""
        obstore, client = self._connect()
        if keys := [self._key(name) for name, _, _ in self._objects(relative_path(path))]:
            obstore.delete(client, keys)

    def remove_partials(self) -> int:
        """Remove this machine's staging folders for this store; nothing partial is ever uploaded."""
        folders = list(self._staging_dir().glob(f"*{PARTIAL}"))
        for folder in folders:
            shutil.rmtree(folder)
        return len(folders)

    def _key(self, path: str) -> str:
        return self._prefix + relative_path(path)

    def _connect(self) -> tuple[Any, Any]:
        obstore = _import_obstore()
        if self._bucket not in _clients:
            if self._bucket.startswith("memory://"):
                _clients[self._bucket] = obstore.store.MemoryStore()
            else:
                _clients[self._bucket] = obstore.store.from_url(self._bucket)
        return obstore, _clients[self._bucket]

    def _objects(self, folder: str) -> Sequence[_Object]:
        """(path, bytes, entity tag) of all objects below `folder`, sorted."""
        obstore, client = self._connect()
        prefix = self._key(folder) if folder else self._prefix.rstrip("/")
        found = [
            (str(meta["path"]).removeprefix(self._prefix), int(meta["size"]), meta["e_tag"])
            for chunk in obstore.list(client, prefix or None)
            for meta in chunk
        ]
        return sorted(found, key=lambda item: item[0])

    def _staging_dir(self) -> Path:
        return _cache_dir() / "staging" / digest_of(self.url)[:16]

    def _check_arrival(self, arrived: Path, path: str, expect: ExpectedFiles) -> None:
        for name, (num_bytes, sha256) in expect.items():
            file = arrived / name if name else arrived
            found_bytes = file.stat().st_size if file.is_file() else None
            if found_bytes != num_bytes or file_sha256(file) != sha256:
                raise CorruptData(
                    f"{self.url}/{path}: {name or 'the object'} arrived with {found_bytes} bytes, not the "
                    f"{num_bytes} bytes of sha256 {sha256[:12]} that were committed; run `cdp verify`"
                )


def _import_obstore() -> Any:
    if _used_by - {os.getpid()}:
        # Its background threads did not survive the fork: the next call would wait for ever.
        raise UserError(
            "an object store was used before this worker process was forked; start workers with "
            'multiprocessing_context="spawn" (or "forkserver")'
        )
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UserError("object stores need obstore; install compodistill[s3]") from error
    _used_by.add(os.getpid())
    return obstore


def _cache_dir() -> Path:
    return Path(os.environ.get("CDP_CACHE_DIR", "~/.cache/compodistill")).expanduser()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, so that the workers of a machine download a shard once."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
