"""The errors a user can cause or meet; the command line prints them without a traceback."""

import errno
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
        StoreUnavailable: Instead of these; any other OSError is left as it is.
    """
    try:
        yield
    except OSError as error:
        if (hint := _TO_DO.get(error.errno or 0)) is None:
            raise
        # A failing write names no file itself.
        raise StoreUnavailable(
            f"{error.filename or path}: {error.strerror}; {hint}, then run the same command again "
            "(nothing half-written counts)"
        ) from error
