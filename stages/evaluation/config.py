"""Settings of how caption pairs are scored."""

from string import Formatter
from typing import Literal

from pydantic import Field, field_validator

from stages.images import MAX_PIXELS
from storage.strict_model import StrictModel


class EvaluationConfig(StrictModel):
    """How pairs are scored."""

    scoring: Literal["likelihood", "letters"] = "likelihood"
    """`likelihood` compares the captions as answers, `letters` lets the model choose A or B."""
    prompt: str = "Describe the image."
    """The question whose answer a caption is; only for `likelihood`."""
    letter_prompt: str = "Which caption fits the image?\nA: {a}\nB: {b}\nAnswer with A or B."
    """The question that shows both captions, in place of `{a}` and `{b}`; only for `letters`."""
    batch_size: int = Field(default=8, ge=1)
    """Pairs that go through the model together; each makes two sequences."""
    max_length: int = Field(default=2048, ge=1)
    """Tokens of the longest sequence the model takes; a longer one is an error, never cut."""
    num_threads: int = Field(default=2, ge=1)
    """Threads that decode images and tokenize while the model works."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Width times height above which an image is refused."""

    @field_validator("letter_prompt")
    @classmethod
    def _shows_both_captions(cls, value: str) -> str:
        if sorted(name for _, name, _, _ in Formatter().parse(value) if name is not None) != ["a", "b"]:
            raise ValueError(f"expected {{a}} and {{b}}, each once, in {value!r}; write other braces twice")
        return value
