"""Which row of a tar belongs to which row of its target shard."""

from storage.errors import CorruptData
from storage.samples import SampleIndex, SampleShardEntry
from storage.targets import TargetShard


def joined_rows(index: SampleIndex, targets: TargetShard) -> tuple[SampleShardEntry, list[int]]:
    """The tar of a target shard, and the tar row of each of its rows.

    Raises:
        CorruptData: Unless the targets' keys are the tar's without the skipped ones, in the tar's order.
    """
    record = targets.record
    if record.shard >= len(index.shards) or index.shards[record.shard].name != record.sample_shard:
        raise CorruptData(
            f"target shard {record.shard} ({record.path}) was made from {record.sample_shard}, not from "
            f"shard {record.shard} of the {len(index.shards)} in the sample index; extract it again"
        )
    entry = index.shards[record.shard]
    skipped = {sample.key for sample in record.skipped}
    tar_keys = [members.key for members in entry.members]
    usable = [(row, key) for row, key in enumerate(tar_keys) if key not in skipped]
    if [key for _, key in usable] != list(targets.keys) or not skipped <= set(tar_keys):
        raise CorruptData(
            f"target shard {record.shard} ({record.path}) has {len(targets)} samples and {len(skipped)} "
            f"skipped ones, which are not the {len(tar_keys)} of {entry.name} in its order; extract it again"
        )
    return entry, [row for row, _ in usable]
