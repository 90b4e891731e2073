from pathlib import Path
from typing import Any

import pytest

from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from tests.checkpoints import load_tiny_llava, make_tiny_llava


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("evaluated"), extra_vocab=5)


@pytest.fixture
def model_and_processor(tiny_llava: Path) -> tuple[Any, Any]:
    return load_tiny_llava(tiny_llava)


@pytest.fixture
def model(model_and_processor: tuple[Any, Any]) -> Any:
    return model_and_processor[0]


@pytest.fixture
def processor(model_and_processor: tuple[Any, Any]) -> Any:
    return model_and_processor[1]


@pytest.fixture
def encoder(processor: Any) -> ConversationEncoder:
    return ConversationEncoder(processor, processor.image_token_id, NO_LIMIT)
