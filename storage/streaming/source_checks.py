"""Whether samples and targets belong together, known from an index and manifests; which samples a subset names."""

from collections.abc import Sequence
from pathlib import Path

from storage.errors import FingerprintMismatch, UserError
from storage.regular_files import read_regular
from storage.targets.manifest import OTHER_SAMPLES, Fingerprint

MAY_DIFFER = frozenset(
    {"samples", "max_length", "dtype", "answer_attention", "prefix_reuse", "tensor_ranks", "max_image_tokens"}
)
"""Of two stores in one mixture; all else that a fingerprint holds decides what a student is or how targets are read.
Whether answer attention is stored matters only where it is asked for, and is looked at there."""

_NAMED = 5
MAX_SUBSET_BYTES = 256 * 2**20
"""Largest list of keys: some ten million of them."""


def check_same_samples(samples_url: str, samples_digest: str, targets_url: str, fingerprint: Fingerprint) -> None:
    """Raises FingerprintMismatch unless the targets were made from the samples whose index has that digest."""
    if samples_digest != fingerprint.samples:
        raise FingerprintMismatch(
            f"targets at {targets_url} were made from samples {fingerprint.samples[:12]}, {samples_url} holds "
            f"{samples_digest[:12]} (differs in: samples); give the right sample set, or extract again. {OTHER_SAMPLES}"
        )


def check_mixable(stores: Sequence[tuple[str, Fingerprint]]) -> None:
    """Raises FingerprintMismatch unless a student can learn from all these stores at once; names what differs.

    Each is an address with the fingerprint that lies there.
    """
    (first_url, first), *others = stores
    for url, other in others:
        names = first.differences(other)
        if differing := [name for name in names if name.split(".")[0] not in MAY_DIFFER]:
            raise FingerprintMismatch(
                f"targets at {first_url} and {url} cannot be mixed (differs in: {', '.join(differing)}); extract both "
                "with the same teacher and settings"
            )


def incomplete(url: str, num_planned: int, missing: Sequence[int]) -> UserError:
    """The refusal of a store whose extraction did not finish; `missing` are its shards without a commit record."""
    found = f"{url} has {num_planned - len(missing)} of {num_planned} shards committed"
    hint = ", or train on these with train.data.allow_incomplete" if len(missing) < num_planned else ""
    return UserError(f"{found} (missing: {list(missing[:_NAMED])}); run `cdp extract-teacher` to finish it{hint}")


def read_keys(path: Path) -> frozenset[str]:
    """Sample keys of a text file, one a line; empty lines do not count.

    Raises:
        UserError: If it cannot be read or names nothing.
    """
    try:
        # With the byte-order mark that some editors write, which would become a part of the first key.
        keys = frozenset(read_regular(path, MAX_SUBSET_BYTES).decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"subset {path} cannot be read: {error}; expected a text file of keys, one a line") from error
    if not keys:
        raise UserError(f"subset {path} names no sample; give a text file of sample keys, one a line")
    return keys
