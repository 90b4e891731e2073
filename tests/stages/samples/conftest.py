from pathlib import Path

import pytest

from tests.stages.samples.llava_data import LlavaFolder


@pytest.fixture
def llava(tmp_path: Path) -> LlavaFolder:
    return LlavaFolder(tmp_path)
