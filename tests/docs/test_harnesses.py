"""The class for VLMEvalKit runs as the page shows it, on a stand-in for that package's base class."""

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.models import load_model
from stages.student.model.chat import Chat
from tests.checkpoints import draw_random_image, make_tiny_llava
from tests.docs.markdown import PAGES


class BaseModel:
    """What `vlmeval.vlm.base.BaseModel` does with a message of a data set, without its conversions."""

    allowed_types = ("text", "image", "video")

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        for part in message:
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
        return str(self.generate_inner(message, dataset))  # type: ignore[attr-defined]


def class_of_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = BaseModel  # type: ignore[attr-defined]
    for name in ("vlmeval", "vlmeval.vlm", base.__name__):
        monkeypatch.setitem(sys.modules, name, base)
    (code,) = PAGES["docs/harnesses.md"].blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)
    return names["CompoDistill"]


def test_it_answers_as_the_model_does_and_takes_no_video(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint, picture = make_tiny_llava(tmp_path / "model"), draw_random_image(random.Random(0))
    picture.save(tmp_path / "picture.png")
    model = class_of_page(monkeypatch)(model_path=str(checkpoint), max_new_tokens=6, use_vllm=False)
    image = {"type": "image", "value": str(tmp_path / "picture.png")}
    asked = [image, {"type": "text", "value": "What is it?"}]
    expected = Chat(*load_model(str(checkpoint)), picture, 6).ask("What is it?", lambda _: None)
    assert model.generate(message=asked, dataset="MMBench_DEV_EN") == expected
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate(message=[{**image, "type": "video"}], dataset="MVBench")
