"""What the teacher said of one sample, in memory; its maps are `storage.codecs.attention_maps.EncodedMaps`."""

from dataclasses import dataclass

from torch import Tensor


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
    logits_RQ: Tensor
    """uint8, a record for each answer token, in order; see `storage.codecs.answer_logits`."""
    num_cut_answer_tokens: int = 0
    """Answer tokens of the conversation that did not fit into `max_length`."""
    is_turned: bool = False
    """Whether EXIF data ask for a turn of one of the pictures that the teacher read."""
    answer_attention_LaN: Tensor | None = None
    """float16, see `storage.codecs.answer_attention`: of each captured layer and answer the mean attention to the image
    tokens, or cells of them. None where it is not stored or was not read, and without an image."""
    cells_X: Tensor | None = None
    """int32, as a store gives it: the cell of each image token. None where maps are of tokens, and without an image."""
