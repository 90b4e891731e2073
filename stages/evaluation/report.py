"""The report of an evaluation."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from storage.errors import UserError
from storage.regular_files import read_regular
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.strict_model import StrictModel


class KindResult(StrictModel):
    """The result on one kind of pairs."""

    num_pairs: int
    accuracy: float
    """Mean over the pairs, within 0 and 1; guessing gives 0.5."""
    interval_95: tuple[float, float]
    """Wilson's 95 % interval of the accuracy; a pair is one trial, also when asked in two orders."""
    first_letter_share: float | None
    """How often the model preferred A over both orders; only for letters."""


class EvaluationReport(StrictModel):
    """The result on a suite."""

    model: str
    """Name or folder the model was loaded from."""
    dtype: str
    """The weights' dtype, such as `bfloat16`."""
    image_backend: str
    """Class that made the pixels."""
    images: ImageConfig = DEFAULT_IMAGES
    """How pictures were read and placed."""
    scoring: Literal["likelihood", "letters"]
    """How captions were compared."""
    prompt: str
    """The question asked; with `{a}` and `{b}` for letters."""
    kinds: dict[str, KindResult]
    """Results by kind."""
    average: float
    """Unweighted mean of the kinds' accuracies."""
    num_pairs: int
    """Pairs scored, over all kinds."""
    seconds: float
    """Wall-clock time of scoring with decoding of images, without loading the model."""
    pairs_per_s: float
    """Pairs scored a second."""


def read_evaluation(path: Path) -> EvaluationReport:
    """A report that `cdp evaluate --report` saved.

    Raises:
        UserError: If it is none.
    """
    try:
        return EvaluationReport.model_validate_json(read_regular(path))
    except OSError as error:
        raise UserError(f"no report of `cdp evaluate --report` at {path}: {error.strerror}; check the path") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        found = f"{path} is no report of `cdp evaluate --report`: {where}: {first['msg']}"
        raise UserError(f"{found} ({error.error_count()} faults); name the file that it saved") from error
