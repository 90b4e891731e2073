import random
from pathlib import Path
from typing import Any

import pytest
from stages.evaluation.caption_pairs import CaptionPair

from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from tests.checkpoints import draw_random_image, load_tiny_llava, make_tiny_llava

CAPTIONS = [
    ("A red square.", "A blue square."),
    ("A red circle is left of a green triangle in the image.", "A green circle."),
    ("Square", "A very small blue circle above a red square above a green triangle above a blue square."),
    ("The {braces} stay.", "The {a} stay."),
    ("A red square is left of a circle.", "A circle is left of a red square."),
]


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


@pytest.fixture
def pairs(tmp_path: Path) -> list[CaptionPair]:
    rng = random.Random(0)
    made = []
    for number, (caption, negative) in enumerate(CAPTIONS):
        path = tmp_path / f"{number}.png"
        draw_random_image(rng).save(path)
        made.append(CaptionPair("swap_obj", str(number), path, caption, negative))
    return made
