"""A checkpoint's weights: loaded whole from its files or refused, and their digest."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from storage.digests import parse_json
from storage.errors import UserError

WEIGHTS = "*.safetensors"  # no *.bin: those are pickles
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(folder: Path) -> None:
    """Reads the header of each weight file, which says how long it is, and looks for all that an index names.

    Raises:
        UserError: If there is none, one is cut short or no safetensors file, or one that the index names is missing.
    """
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors weights. Pickled ones (*.bin, *.pth) are never loaded, as that can run "
            "code: where you trust them, load the model and call save_pretrained(..., safe_serialization=True)"
        )
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) is not whole, or no safetensors file ({error}); a download or "
                "copy that broke off leaves such a file: fetch it again"
            ) from error
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        indexed_files(folder)


def indexed_files(folder: Path) -> set[str]:
    """The files that a checkpoint's index names, all of which are in its folder.

    Raises:
        UserError: If one is missing, or it is no such index.
    """
    index = folder / INDEX
    fields = parse_json(index.read_bytes(), str(index))
    named = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(named, dict):
        raise UserError(f"{index} has no weight_map; expected the index of a checkpoint in several files")
    names = {str(name) for name in named.values()}
    # Only names of its own files: others would leave it.
    if lost := names - {path.name for path in folder.glob(WEIGHTS)}:
        raise UserError(f"{index} names {some(lost)}, which the folder does not hold; fetch the checkpoint again")
    return names


def load_weights(auto_class: Any, folder: Path, *, nothing_else: bool = False, **settings: Any) -> PreTrainedModel:
    """A model all of whose weights are in the checkpoint's files.

    The library gives those that are not there random values and only logs it: each load would be another model.

    Args:
        auto_class: of the library, with `from_pretrained`.
        folder: the checkpoint.
        nothing_else: whether the files may hold no other tensors either, as in checkpoints made here. Published ones
            hold some that no class reads.
        settings: for `from_pretrained`; `device_map="meta"` reads headers only.

    Raises:
        UserError: If a file is not whole, or a tensor is missing or has another shape than the config asks for.
    """
    check_files(folder)
    loaded: PreTrainedModel
    loaded, found = auto_class.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    other_shapes = [f"{name} {list(held)} for {list(asked)}" for name, held, asked in found["mismatched_keys"]]
    # Tied weights, which are stored once, are not among the missing ones.
    wrong = {
        "missing": found["missing_keys"],
        "of another shape": other_shapes,
        "unexpected": found["unexpected_keys"] if nothing_else or found["missing_keys"] else [],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        raise UserError(
            f"the weight files of {folder} do not hold the model that its config.json describes ({listed}); what is "
            "missing would be random numbers. Fetch the checkpoint again, or save the model that it was made from again"
        )
    return loaded


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of all weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHTS)):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are; "none" for none."""
    first, rest = sorted(names)[:3], sorted(names)[3:]
    return (", ".join(first) or "none") + (f" and {len(rest)} more" if rest else "")
