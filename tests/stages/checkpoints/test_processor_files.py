"""What says without a library that a processor or a chat template is missing takes every place they may lie in."""

import json
import shutil
from pathlib import Path

import pytest

from stages.checkpoints.processor_files import check_own_template, check_processor_files
from stages.checkpoints.processors import load_processor
from stages.conversations.chat_templates import chat_template
from storage.errors import UserError
from tests.checkpoints import CHAT_TEMPLATE, make_tiny_llava

PLACES = {
    "chat_template.jinja": CHAT_TEMPLATE,
    "chat_template.json": json.dumps({"chat_template": CHAT_TEMPLATE}),
    "processor_config.json": {"chat_template": CHAT_TEMPLATE},
    "tokenizer_config.json": {"chat_template": CHAT_TEMPLATE},
    "tokenizer_config.json, several": {"chat_template": [{"name": "default", "template": CHAT_TEMPLATE}]},
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava") / "llava")


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_seen_wherever_the_library_finds_one(place: str, llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "llava"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template; save one with it \(chat_template.jinja\)!"):
        check_own_template(folder, "!")
    with pytest.raises(UserError, match=r"llava has no \(default\) chat template"):
        chat_template(load_processor(folder))
    file, content = folder / place.split(",")[0], PLACES[place]
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    check_own_template(folder, "!")
    assert chat_template(load_processor(folder)) == CHAT_TEMPLATE


def test_settings_of_images_and_vocabularies_may_have_other_names(llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "llava"))
    (folder / "processor_config.json").rename(folder / "preprocessor_config.json")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    check_processor_files(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: tokenizer.json is absent"):
        check_processor_files(folder)
