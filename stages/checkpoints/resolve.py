"""Finds a Hugging Face checkpoint: a folder here, or a model id of the hub."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from stages.checkpoints.config_files import CONFIG, read_config
from stages.checkpoints.gguf import gguf_file
from stages.checkpoints.quantization_scheme import refuse_quantized
from stages.checkpoints.weight_files import check_files
from storage.errors import UserError, first_line
from storage.regular_files import refuse_special_files, refuse_unusable
from storage.stores import LocalStore
from storage.stores.recognize import CHECKPOINT, what_lies_at

_WEIGHTS = "*.safetensors"  # no *.bin: those are pickles
_NEEDED_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def resolve_checkpoint(name: str | Path, *, with_weights: bool = True) -> Path:
    """The local folder of a checkpoint.

    Raises:
        UserError: If there is none, its safetensors weights are missing or not whole, or it is a GGUF file.
    """
    if (file := gguf_file(Path(name))) is not None:
        raise UserError(
            f"{file} is a GGUF file, which is read as a student's decoder and as nothing else; expected a checkpoint "
            "folder with safetensors weights"
        )
    folder = local_folder(name, with_weights=with_weights)
    if not (folder / CONFIG).is_file():
        found = what_lies_at(LocalStore(folder))
        raise UserError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder, found {found}")
    if with_weights:
        check_files(folder)
    return folder


def resolve_student(name: str | Path) -> Path:
    """The local folder of a checkpoint that is to be trained; a GGUF file is converted into one.

    Raises:
        UserError: As `resolve_checkpoint` and `converted`; if its weights are quantized in another way.
    """
    from stages.checkpoints.gguf_decoder import converted  # loads torch

    file = gguf_file(Path(name))
    folder = resolve_checkpoint(name) if file is None else converted(file)
    refuse_quantized(read_config(folder / CONFIG), folder, "a student")
    return folder


def local_folder(name: str | Path, *, with_weights: bool = False) -> Path:
    """A folder as it is, else that of a model id of the hub, downloaded once.

    Raises:
        UserError: If it is neither, is not UTF-8, or holds something that is no regular file.
    """
    folder = Path(name)
    refuse_unusable(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} is a file, expected the folder of {CHECKPOINT}; name the folder")
    if not folder.is_dir():
        patterns = _NEEDED_FILES + [_WEIGHTS] * with_weights
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=patterns))
        except Exception as error:  # of the hub, the disk, or whatever library speaks HTTP beneath
            raise UserError(f"no checkpoint at {name}: there is no such folder here, {_why_none(error)}") from error
    # The library would wait for ever for a FIFO among them.
    refuse_special_files(folder)
    return folder


def in_hub_cache(name: str) -> bool:
    """Whether this machine got a model of that id from the hub; asks nothing of the network."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _why_none(error: Exception) -> str:
    """Why a name that is no folder is no model of the hub either, and what to do."""
    said = f"({type(error).__name__}: {first_line(error)})"
    if isinstance(error, HFValidationError):
        return "and it is no model id either; check the path"
    if isinstance(error, GatedRepoError):
        return (
            f"and the hub asks to accept the model's terms {said}; accept them on its page, then log in (hf auth login)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"and the hub has no model of this id, or shows it to others {said}; check the name, or log in"
    if not isinstance(error, LocalEntryNotFoundError):
        return f"and the hub did not give a model of this id {said}; check the name, or try again later"
    if constants.HF_HUB_OFFLINE:
        return "and HF_HUB_OFFLINE lets nothing be fetched that this machine does not hold; check the path, or unset it"
    return (
        f"and the model hub at {constants.ENDPOINT} does not answer {said}; check the path, or network and HF_ENDPOINT"
    )
