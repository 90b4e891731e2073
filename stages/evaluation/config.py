"""Settings of how suites are put to a model."""

from pathlib import Path

from pydantic import Field

from stages.evaluation.suites.suite import Protocol
from stages.images import MAX_PIXELS
from storage.strict_model import StrictModel


class SuiteConfig(StrictModel):
    """A suite that is asked for."""

    data: Path
    """Folder with the suite's files, as its makers publish them."""
    images: Path | None = None
    """Folder of the pictures, where they lie elsewhere."""
    protocol: Protocol | None = None
    """How it is asked; None is its makers' way."""
    blind: bool = False
    """Whether a grey picture is shown in place of each: what is right then needs no eyes."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each kind, the first of them; None takes all."""
    allow_missing_images: bool = False
    """Whether items without their images are counted as missing; otherwise they are an error."""


class EvaluationConfig(StrictModel):
    """How suites are put to a model."""

    suites: dict[str, SuiteConfig] = Field(default_factory=dict)
    """The suites of `--suite all`, by name."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences that go through the model together; those about one picture stay together."""
    max_length: int = Field(default=4096, ge=1)
    """Tokens of the longest sequence the model takes; a longer one is an error, never cut."""
    num_threads: int = Field(default=2, ge=1)
    """Threads that decode images and tokenize while the model works."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Width times height above which an image is refused."""
    num_resamples: int = Field(default=1000, ge=100)
    """Resampled sets of items that an interval is made of."""
