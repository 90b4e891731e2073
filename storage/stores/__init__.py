"""Where bytes lie: a local folder or an object-store prefix, behind one small protocol."""

import re
from pathlib import Path

from storage.errors import UserError
from storage.stores.base import PARTIAL, ExpectedFiles, FileInfo, Store, relative_path
from storage.stores.local import LocalStore
from storage.stores.objects import SCHEMES, ObjectStore

__all__ = ["PARTIAL", "ExpectedFiles", "FileInfo", "LocalStore", "ObjectStore", "Store", "open_store", "relative_path"]


def open_store(url: str | Path | Store) -> Store:
    """The store at `url`: a folder (path or `file://`), or `s3://`, `gs://`, `az://`, `memory://`; a store itself.

    Nothing is read or created here; an object store connects on first use, in the process that uses it.

    Raises:
        UserError: For any other scheme.
    """
    if isinstance(url, Path):
        return LocalStore(url)
    if not isinstance(url, str):
        return url
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if scheme is None or scheme[1] == "file":
        return LocalStore(Path(url.removeprefix("file://")))
    if scheme[1] in SCHEMES:
        return ObjectStore(url)
    raise UserError(
        f"cannot open {url}: scheme {scheme[1]}:// is unknown; "
        f"use a folder or one of {', '.join(f'{name}://' for name in SCHEMES)}"
    )
