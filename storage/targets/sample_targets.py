"""What the teacher said of one sample, in memory.

Apart from `storage.targets`, so that whoever makes or uses these needs neither zarr nor webdataset.
Letters: T tokens, R answer rows, B bytes of a record.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from storage.codecs.maps import EncodedMaps
from storage.codecs.windows import EncodedWindows


@dataclass(frozen=True)
class SampleTargets:
    """One sample as the teacher saw it, and what it predicted."""

    key: str
    """The sample's key in its tar."""
    token_ids: Tensor
    """int32 [T], exactly what the teacher read."""
    answer_mask: Tensor
    """bool [T]: the token itself belongs to an answer; position t - 1 predicts it."""
    map_row: int | None
    """Which maps of the shard are this sample's; None without an image."""
    logits_RB: Tensor
    """uint8, a record for each answer token, in order; see `storage.codecs.answer_logits`."""


@dataclass(frozen=True)
class MapTargets:
    """The attention maps of one image after one prefix, coded; several samples may share them."""

    num_tokens: int
    """N: image tokens."""
    maps: EncodedMaps
    """Codes of the captured layers."""
    windows: EncodedWindows | None
    """What makes the standard windows exact; None where only some of the layers were read."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "MapTargets":
        """The same on a device."""
        windows = None if self.windows is None else self.windows.to(device, non_blocking=non_blocking)
        return MapTargets(self.num_tokens, self.maps.to(device, non_blocking=non_blocking), windows)


@dataclass(frozen=True)
class SkippedSample:
    """A sample without targets, and why."""

    key: str
    """The sample's key in its tar."""
    id: str
    """The conversation's own id."""
    reason: str
    """A short name to count by, such as `image_unreadable`."""
    detail: str
    """What was found."""
