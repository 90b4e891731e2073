"""What the teacher said of one sample, in memory.

Apart from `storage.targets`, so that whoever makes or uses these needs neither zarr nor webdataset.
Letters: T tokens, L captured layers, E stored entries of one map, W windows.
"""

from dataclasses import dataclass

from torch import Tensor

from storage.codecs.answer_logits import AnswerLogits


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
    logits: AnswerLogits
    """One row for each answer token, in order."""


@dataclass(frozen=True)
class MapTargets:
    """The attention maps of one image after one prefix, coded; several samples may share them."""

    num_tokens: int
    """N: image tokens."""
    codes_LE: Tensor
    """uint8 or float16, see `storage.codecs.maps`."""
    caps_L: Tensor
    """float32."""
    keep_masks: Tensor
    """uint8 [W, ceil(E / 8)], exact sink masks of the windows, see `storage.codecs.sinks`."""


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
