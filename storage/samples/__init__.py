"""Sample shards: conversations and their images as WebDataset tars with their member tables and an index."""

from storage.samples.index import SampleIndex, SampleShardEntry
from storage.samples.members import StoredSample, image_suffix
from storage.samples.reader import SampleShard
from storage.samples.table import SampleMembers
from storage.samples.writer import SampleShardWriter

__all__ = [
    "SampleIndex",
    "SampleMembers",
    "SampleShard",
    "SampleShardEntry",
    "SampleShardWriter",
    "StoredSample",
    "image_suffix",
]
