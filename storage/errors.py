"""The errors a user can cause or meet; the command line prints them without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class FingerprintMismatch(UserError):
    """A target store was made by another teacher, tokenizer, template, data or format than this run names."""


class CorruptData(UserError):
    """Stored bytes are missing or differ from what was committed."""


class TooManySkipped(UserError):
    """More samples were unusable than `max_skipped_fraction` allows; the ledger names each and why."""
