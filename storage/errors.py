"""The errors a user can cause or meet; the command line prints them without a traceback."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_MESSAGE_CHARS = 5000
"""A stranger's file may hold names of a megabyte, or a hundred thousand faults."""


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""

    def __str__(self) -> str:
        """The message, without its middle if it is too long to be read."""
        text, half = super().__str__(), MAX_MESSAGE_CHARS // 2
        return text if len(text) <= 2 * half else f"{text[:half]} [{len(text) - 2 * half:,} characters] {text[-half:]}"


class FingerprintMismatch(UserError):
    """A target store was made by another teacher, tokenizer, template, data or format than this run names."""


class CorruptData(UserError):
    """Stored bytes are missing, differ from what was committed, or are no file that this project would write."""


class PassingFailure(UserError):
    """Something that may be over by itself: whoever may try again, should."""


class StoreUnavailable(PassingFailure):
    """A disk or an object store refused or did not answer: nothing is known of the bytes it holds."""


class NoHardLinks(UserError):
    """A file system has no step that creates a file whole, and only if there is none."""


class TooManySkipped(UserError):
    """More samples were unusable than `max_skipped_fraction` allows; the ledger names each and why."""


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its type: libraries add advice below that does not fit here."""
    return next(iter(str(error).splitlines()), type(error).__name__)


_TO_DO = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "use a file system, or a limit, that allows larger files",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "mount it writable, or choose another folder",
}


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """A full disk, a lost permission or a read-only mount inside the block becomes an error that names the file.

    Raises:
        StoreUnavailable: Instead of these; any other error is left as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _errno(error)
        if (hint := _TO_DO.get(number)) is None:
            raise
        # A failing write names no file itself.
        name = getattr(error, "filename", None) or path
        raise StoreUnavailable(
            f"{name}: {os.strerror(number)}; {hint}, then run the same command again (nothing half-written counts)"
        ) from error


def _errno(error: Exception) -> int:
    """Of an OSError, or as libraries in Rust, which write weights and tokenizers, end their text with it; else 0."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


_NO_PATH = {
    errno.ENAMETOOLONG: "is longer than a name or path may be; choose a shorter one",
    errno.ENOTDIR: "leads through a file; name a folder",
    errno.EISDIR: "is a folder, expected a file; name a file",
    errno.EEXIST: "exists and is no folder; name a folder",
    errno.ENOENT: "is not there, and cannot be made there; check the path",
    errno.ELOOP: "is a loop of links; name a file or folder",
}
_SHOWN_CHARS = 200


@contextmanager
def path_errors_named() -> Iterator[None]:
    """What cannot be a path, for whatever a command wanted with it, becomes a named error.

    Raises:
        UserError: Instead of an OSError about the path itself; any other is left as it is.
    """
    try:
        yield
    except OSError as error:
        why = _NO_PATH.get(error.errno or 0)
        if why is None or error.filename is None:
            raise
        name = str(error.filename)
        shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}... ({len(name)} characters)"
        raise UserError(f"{shown} {why}") from error
