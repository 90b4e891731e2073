"""What answers of a suite may be of, for tests that need no more than that."""

from typing import Any

from stages.evaluation.result import SuiteRun
from storage.samples.image_settings import DEFAULT_IMAGES


def suite_run(**other: Any) -> SuiteRun:
    """A run of SugarCrepe by likelihood; `other` says what is otherwise."""
    values: dict[str, Any] = {
        "suite": "sugarcrepe",
        "protocol": "likelihood",
        "blind": False,
        "items": "d",
        "model": "m",
        "weights": "w",
        "dtype": "float32",
        "image_backend": "B",
        "images": DEFAULT_IMAGES,
    }
    return SuiteRun(**values | other)
