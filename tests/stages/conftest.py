"""Fixtures that tests of teachers and of students share."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.stages.extracted_families import Extracted, extract_family, make_samples


@pytest.fixture(scope="session")
def extract(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Extracted]:
    """Extracts once for each family that a test asks for; tests read it and write elsewhere."""
    samples = make_samples(tmp_path_factory.mktemp("family-samples"))
    return cache(lambda model_type: extract_family(model_type, samples, tmp_path_factory.mktemp(model_type)))
