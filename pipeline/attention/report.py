"""What `cdp compare-attention` says, as it is saved with --report."""

from pydantic import Field

from stages.evaluation.attention.answers import AnswersSplit
from stages.evaluation.attention.measures import Estimate
from stages.evaluation.attention.similarity import AttentionSimilarity
from stages.evaluation.attention.tally import LayerMeasures
from storage.strict_model import StrictModel


class StudentAttention(StrictModel):
    """One student beside the teacher."""

    similarity: AttentionSimilarity
    intervals: tuple[Estimate | None, ...]
    """Of the similarity of each matched pair, over images."""
    mean: Estimate | None
    """Of the mean over the pairs."""
    measures: LayerMeasures
    answers: tuple[AnswersSplit, ...] = ()
    """By right and wrong answers, of each suite that was given."""
    samples: dict[str, tuple[float, ...]]
    """Similarity of each matched pair, by the sample's key."""


class AttentionReport(StrictModel):
    """Teacher and students on the same samples."""

    num_samples: int
    """With an image."""
    num_images: int
    """Different ones."""
    num_without_image: int
    """Samples that were left out: attention to an image is compared."""
    text: str | None
    """From which rows of text attention was taken: `answer`, or a word of it."""
    num_with_text: int
    """Samples that have these rows."""
    num_images_with_text: int
    """Different images of these samples."""
    num_object_pictures: int
    """Named by the objects given."""
    num_with_objects: int
    """Samples whose picture is among them."""
    teacher_is_live: bool
    """Whether the teacher itself was run; otherwise its maps are the stored ones."""
    teacher: LayerMeasures
    students: dict[str, StudentAttention] = Field(default_factory=dict)
