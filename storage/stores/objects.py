"""A store that is a prefix of an object store, reached through obstore."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from storage.digests import digest_of, file_sha256
from storage.errors import CorruptData, StoreUnavailable, UserError, disk_errors_named
from storage.regular_files import MAX_BYTES
from storage.stores.base import PARTIAL, ExpectedFiles, Store, is_inside, relative_path
from storage.stores.cache import cache_dir, cached
from storage.stores.local import LocalStore
from storage.stores.owner import partial_path, remove_if_abandoned

SCHEMES = ("s3", "gs", "az", "memory")

PART_BYTES = 32 * 2**20
"""Most of an object that one request fetches, so that a broken or slow connection costs no more than this again."""
TIMEOUT_S = 120.0
"""Of one request, from its start to its last byte."""
MAX_RETRIES = 6
RETRY_TIMEOUT_S = 180.0
"""Server errors, time-outs and dropped connections are tried again so often, within so long, with growing pauses; then
the command ends with an error."""

_Object = tuple[str, int, str | None]
"""Path below the prefix, bytes, entity tag."""

_clients: dict[str, Any] = {}
_used_by: set[int] = set()
"""Process numbers that used obstore: a forked child inherits its parent's and must not go on."""


class ObjectStore(Store):
    """Whole objects below `scheme://bucket/prefix`; credentials and endpoint come from the environment.

    What is read through `local` is cached under a name made of the objects' sizes and entity tags, so that a replaced
    object is downloaded again. A store that does not answer after all retries, or refuses, is a `StoreUnavailable`
    from any method.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        scheme, _, rest = self.url.partition("://")
        bucket, _, prefix = rest.partition("/")
        self._bucket = f"{scheme}://{bucket}"
        if prefix and not is_inside(prefix):
            raise UserError(f"{url!r} is no address: its parts may not be empty, '.' or '..'; name the folder itself")
        self._prefix = f"{prefix}/" if prefix else ""

    def read(self, path: str, max_bytes: int = MAX_BYTES) -> bytes:
        """All bytes of an object, once its size is known to be allowed."""
        with self._reaching("read", path) as (obstore, client):
            answer = obstore.get(client, self._key(path))
            if (found := answer.meta["size"]) > max_bytes:
                where = f"{self.url}/{path}"
                raise CorruptData(f"{where} has {found} bytes, at most {max_bytes} are read of such a file")
            return bytes(answer.bytes())

    def exists(self, path: str) -> bool:
        """Whether an object of this name exists."""
        return self._head(path) is not None

    def write(self, path: str, data: bytes) -> None:
        """Put the object; object stores show it whole or not at all."""
        with self._reaching("write", path) as (obstore, client):
            obstore.put(client, self._key(path), data)

    def check_create(self) -> None:
        """Nothing to try: `create` works in every object store that is served."""

    def create(self, path: str, data: bytes) -> bool:
        """Put the object on condition that none has this name."""
        obstore, client = self._connect()
        try:
            obstore.put(client, self._key(path), data, mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            # Also when our first request succeeded and its answer got lost: then the second one finds our bytes.
            return self.read(path) == data
        except obstore.exceptions.BaseError:
            with self._reaching("create", path):
                # The same, where the store answers with an error until the retries end.
                if self._head(path) is None:
                    raise
            return self.read(path) == data
        return True

    def folders(self, prefix: str) -> list[str]:
        """Sorted relative paths of the prefixes directly below `prefix`: a request for a thousand of them."""
        with self._reaching("list", prefix) as (obstore, client):
            found = obstore.list_with_delimiter(client, self._key(prefix))["common_prefixes"]
        names = (str(path).removeprefix(self._prefix).rstrip("/") for path in found)
        return sorted(name for name in names if not name.endswith(PARTIAL))

    def list(self, prefix: str = "") -> list[str]:
        """Sorted relative paths of the objects below `prefix`."""
        return list(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each object below `prefix`."""
        return {name: size for name, size, _ in self._objects(prefix) if PARTIAL not in name}

    def local(self, path: str, expect: ExpectedFiles | None = None, holder: object | None = None) -> Path:
        """Download an object, or all objects below a folder, into the cache."""
        objects = self._objects_at(path)

        def fill(folder: Path) -> None:
            self._download(path, objects, folder)
            self._check_arrival(folder / Path(path).name, path, expect or {})

        key = digest_of([self._bucket, self._key(path), objects])[:32]
        return cached(key, sum(size for _, size, _ in objects), fill, holder) / Path(path).name

    @contextmanager
    def as_stored(self, path: str) -> Iterator[LocalStore]:
        """A download of its own, removed after the block."""
        folder = self.staging(Path(path).name)
        try:
            self._download(path, self._objects_at(path), folder / Path(path).parent)
            yield LocalStore(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def move(self, path: str, to: str) -> None:
        """Copy each object, then delete it."""
        key, target = self._key(path), self._key(to)
        with self._reaching("move", path) as (obstore, client):
            names = [self._key(name) for name, _, _ in self._objects(path)] or ([key] if self.exists(path) else [])
            for name in names:
                obstore.copy(client, name, target + name.removeprefix(key))
            if names:
                obstore.delete(client, names)

    def staging(self, name: str) -> Path:
        """A new folder on this machine; `put_tree` uploads it."""
        folder = partial_path(self._staging_dir() / Path(name).name)
        with disk_errors_named(folder):
            folder.mkdir(parents=True)
        return folder

    def put_tree(self, local_dir: Path, path: str) -> None:
        """Upload every file, in sorted order; the folder is complete for readers when its commit names it."""
        files = {f"{path}/{p.relative_to(local_dir).as_posix()}": p for p in local_dir.rglob("*") if p.is_file()}
        with self._reaching("write", path) as (obstore, client):
            # What else lies there was left by a dead writer: readers of this name expect these files alone.
            if strange := [self._key(name) for name, _, _ in self._objects(relative_path(path)) if name not in files]:
                obstore.delete(client, strange)
            for name, file in sorted(files.items()):
                obstore.put(client, self._key(name), file)
        shutil.rmtree(local_dir)

    def remove_tree(self, path: str) -> None:
        """Delete every object below the folder."""
        with self._reaching("remove", path) as (obstore, client):
            if keys := [self._key(name) for name, _, _ in self._objects(relative_path(path))]:
                obstore.delete(client, keys)

    def remove_partials(self, is_whole: Callable[[str], bool] | None = None) -> int:
        """Remove this machine's abandoned staging folders for this store; nothing partial is ever uploaded."""
        folder = self._staging_dir()
        with disk_errors_named(folder):
            return sum(remove_if_abandoned(path) for path in folder.glob(f"*{PARTIAL}"))

    def _key(self, path: str) -> str:
        return self._prefix + relative_path(path)

    def _connect(self) -> tuple[Any, Any]:
        obstore, bucket = _import_obstore(), self._bucket
        if bucket not in _clients and bucket.startswith("memory://"):
            _clients[bucket] = obstore.store.MemoryStore()
        elif bucket not in _clients:
            retries = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)}
            options = _client_options()
            _clients[bucket] = obstore.store.from_url(bucket, client_options=options, retry_config=retries)
        return obstore, _clients[bucket]

    @contextmanager
    def _reaching(self, what: str, path: str) -> Iterator[tuple[Any, Any]]:
        """The library and a client, whose errors become one for the user; an absent object is a FileNotFoundError."""
        obstore, client = self._connect()
        try:
            yield obstore, client
        except obstore.exceptions.BaseError as error:
            # Without the page of debugging that obstore adds.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise StoreUnavailable(
                f"{self.url}: could not {what} {path or 'its objects'}: {reason[0]}; check the network, "
                "the endpoint and the credentials, then run the same command again"
            ) from error

    def _head(self, path: str) -> Any:
        """Size and entity tag of an object, None if there is none."""
        with self._reaching("read", path) as (obstore, client), suppress(FileNotFoundError):
            return obstore.head(client, self._key(path))
        return None

    def _objects(self, folder: str) -> Sequence[_Object]:
        """(path, bytes, entity tag) of all objects below `folder`, sorted."""
        prefix = self._key(folder) if folder else self._prefix.rstrip("/")
        with self._reaching("list", folder) as (obstore, client):
            metas = [meta for chunk in obstore.list(client, prefix or None) for meta in chunk]
        return sorted(
            (str(each["path"]).removeprefix(self._prefix), int(each["size"]), each["e_tag"]) for each in metas
        )

    def _objects_at(self, path: str) -> Sequence[_Object]:
        """The objects below the folder `path`, or the one of this name."""
        if objects := self._objects(relative_path(path)):
            return objects
        if (meta := self._head(path)) is None:
            raise FileNotFoundError(f"{self.url}/{path} does not exist")
        return [(path, meta["size"], meta["e_tag"])]

    def _download(self, path: str, objects: Sequence[_Object], folder: Path) -> None:
        """Write the objects of `path` below `folder`, in parts."""
        for name, size, tag in objects:
            # An object store takes any name, a folder does not.
            if not is_inside(name):
                raise CorruptData(f"{self.url} holds {name!r}, which cannot be a file's path; remove that object")
            target = folder / Path(path).name / name.removeprefix(path).lstrip("/")
            with disk_errors_named(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for start in range(0, size, PART_BYTES):
                        file.write(self._part(name, start, min(start + PART_BYTES, size), tag))

    def _part(self, name: str, start: int, end: int, tag: str | None) -> bytes:
        """Bytes of the object as it was listed."""
        options = {"range": (start, end)} | ({"if_match": tag} if tag else {})
        with self._reaching("read", name) as (obstore, client):
            try:
                data = bytes(obstore.get(client, self._key(name), options=options).bytes())
            except (FileNotFoundError, obstore.exceptions.PreconditionError) as error:
                change = "removed" if isinstance(error, FileNotFoundError) else "replaced"
                raise CorruptData(f"{self.url}/{name} was {change} while it was read; run the command again") from None
        if len(data) != end - start:
            sizes = f"asked for {end - start} bytes, the store sent {len(data)}"
            raise StoreUnavailable(f"{self.url}/{name}: {sizes}; run the command again")
        return data

    def _staging_dir(self) -> Path:
        return cache_dir() / "staging" / digest_of(self.url)[:16]

    def _check_arrival(self, arrived: Path, path: str, expect: ExpectedFiles) -> None:
        for name, (num_bytes, sha256) in expect.items():
            file = arrived / name
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
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UserError("object stores need obstore; install compodistill[s3]") from error
    _used_by.add(os.getpid())
    return obstore


def _client_options() -> dict[str, Any]:
    options: dict[str, Any] = {"timeout": timedelta(seconds=TIMEOUT_S), "connect_timeout": timedelta(seconds=10)}
    # With options of our own, obstore no longer looks for this one in the environment.
    if any(os.environ.get(f"{name}_ALLOW_HTTP", "").lower() in ("true", "1") for name in ("AWS", "GOOGLE", "AZURE")):
        options["allow_http"] = True
    return options
