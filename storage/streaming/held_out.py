"""Which samples are held out of training, so that the loss on them can be measured."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from hashlib import sha256

from storage.errors import UserError
from storage.targets.store import TargetStore

_NAMED = 5


@dataclass(frozen=True)
class HeldOut:
    """A choice of samples that depends on their keys alone: each process, stage and store makes the same one.

    Attributes:
        setting: what says so, for errors.
        share: about this share of all samples: those whose key has a low digest; 0 chooses by `keys`.
        seed: another one is another choice of that share.
        keys: these samples.
    """

    setting: str
    share: float = 0.0
    seed: int = 0
    keys: frozenset[str] = frozenset()

    def __contains__(self, key: str) -> bool:
        """Whether the sample of that key is held out."""
        if not self.share:
            return key in self.keys
        drawn = int.from_bytes(sha256(f"{self.seed} {key}".encode()).digest()[:8])
        return drawn < self.share * 2**64

    def check(self, held: Set[str], num_trained: int, stores: Iterable[TargetStore]) -> None:
        """Refuses a choice that cannot be used.

        Args:
            held: the keys that are held out.
            num_trained: samples that are left.
            stores: where they were looked for.

        Raises:
            UserError: If a listed key has no targets, or no sample is held out, or none is left.
        """
        if unknown := self.keys - held:
            stores = tuple(stores)
            of_shards = (record.skipped for store in stores for record in store.commits.values())
            reasons = {sample.key: f" (skipped: {sample.reason})" for skipped in of_shards for sample in skipped}
            named = [key + reasons.get(key, "") for key in sorted(unknown)[:_NAMED]]
            raise UserError(
                f"{self.setting} names {len(self.keys)} samples, {', '.join(store.store.url for store in stores)} has "
                f"no targets for {len(unknown)} of them: {', '.join(named)}{', ...' * (len(unknown) > _NAMED)}; name "
                "the keys of samples that the extraction did not skip, or give a stage with other targets its own "
                "validation_subset"
            )
        if not held:
            raise UserError(
                f"{self.setting} holds out none of {num_trained} samples, expected at least one; give a larger share, "
                "another train.validation.share_seed, or the keys of the samples"
            )
        if not num_trained:
            raise UserError(
                f"{self.setting} holds out all {len(held)} samples, expected some to train on; give a smaller share, "
                "or fewer keys"
            )
