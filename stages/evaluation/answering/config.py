"""Settings of how questions are answered."""

from pydantic import Field

from stages.images import MAX_PIXELS
from storage.strict_model import StrictModel


class AnsweringConfig(StrictModel):
    """How a model is asked; what it answers does not depend on it."""

    batch_size: int = Field(default=16, ge=1)
    """Sequences that go through the model together; those about one picture stay together."""
    max_length: int = Field(default=4096, ge=1)
    """Tokens of the longest sequence the model takes; a longer one is an error, never cut."""
    num_threads: int = Field(default=2, ge=1)
    """Threads that decode images and tokenize while the model works."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Width times height above which an image is refused."""
