"""Whether a checkpoint's folder holds the files of a processor and a chat template; known without a library."""

from pathlib import Path

from stages.checkpoints.config_files import read_config
from storage.errors import UserError

TOKENIZER = "tokenizer.json"
_OF_IMAGES = ("processor_config.json", "preprocessor_config.json")
_VOCABULARIES = (TOKENIZER, "*.model", "vocab.*", "tekken.json", "*.tiktoken")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_WITH_TEMPLATES = ("processor_config.json", "tokenizer_config.json")


def check_processor_files(folder: Path) -> None:
    """Refuses a checkpoint that lacks the files of which its processor is made, whatever they hold.

    Raises:
        UserError: If it has no file that says how images are read, or none with a vocabulary.
    """
    if not any((folder / name).is_file() for name in _OF_IMAGES):
        raise UserError(
            f"{folder} has no processor: neither {' nor '.join(_OF_IMAGES)} is there, which say how images are read; "
            "fetch or save them again"
        )
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer: {TOKENIZER} is absent; fetch or save it again")


def check_own_template(folder: Path, todo: str) -> None:
    """Refuses a checkpoint without a chat template; `todo` says what else can be done than to add one.

    Raises:
        UserError: If it has none, or a config that may hold one cannot be read.
    """
    files = [folder / name for name in _WITH_TEMPLATES]
    named = any(read_config(file).get("chat_template") for file in files if file.is_file())
    if not named and not any(any(folder.glob(pattern)) for pattern in _TEMPLATES):
        raise UserError(f"{folder} has no chat template; save one with it (chat_template.jinja){todo}")
