"""Settings of how suites are put to a model."""

from pathlib import Path

from pydantic import Field

from stages.evaluation.answering.config import AnsweringConfig
from stages.evaluation.suites.suite import Protocol
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


class EvaluationConfig(AnsweringConfig):
    """How suites are put to a model."""

    suites: dict[str, SuiteConfig] = Field(default_factory=dict)
    """The suites of `--suite all`, by name."""
    num_resamples: int = Field(default=1000, ge=100)
    """Resampled sets of items that an interval is made of."""
    num_workers: int | None = Field(default=None, ge=1)
    """Workers of a Ray cluster that answer side by side; None answers in this process, or in those of torchrun."""
    ray_address: str | None = None
    """Address of that cluster; None starts one on this machine."""
