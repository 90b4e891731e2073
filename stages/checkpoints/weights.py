"""A checkpoint's weights: loaded whole from its files or refused, and their digest."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from stages.checkpoints.configs import load_config, unfit_named
from stages.checkpoints.quantization import load_quantized, scheme_of
from storage.digests import parse_json
from storage.errors import UserError
from storage.regular_files import open_regular, read_regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
MAX_HEADER_BYTES = 2**24
"""That of a hundred thousand tensors in one file; each costs the library memory and time before it is looked at."""


def weight_files(folder: Path) -> list[Path]:
    """The files that are loaded, and no other: `SINGLE`, otherwise those that `INDEX` names.

    Raises:
        UserError: If there is neither, or a file that the index names is missing, or an adapter lies beside them.
    """
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder / _ADAPTER} asks for a PEFT adapter on top of the weights, which is refused; merge it into the "
            "model (merge_and_unload) and save that, or remove the file"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return sorted(folder / name for name in _indexed_names(folder))
    raise UserError(
        f"{folder} has neither {SINGLE} nor {INDEX}. Pickled weights (*.bin, *.pth) are never loaded, as that can run "
        "code: where you trust them, load the model and call save_pretrained(..., safe_serialization=True)"
    )


def check_files(folder: Path) -> None:
    """Reads the header of each weight file, which says how long it is.

    Raises:
        UserError: As `weight_files`; if one is cut short or no safetensors file, or its header is too large.
    """
    for path in weight_files(folder):
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise UserError(
                f"{path} says that its header has {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read; fetch it "
                "again"
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) is not whole, or no safetensors file ({error}); a download or "
                "copy that broke off leaves such a file: fetch it again"
            ) from error


def _indexed_names(folder: Path) -> set[str]:
    index = folder / INDEX
    fields = parse_json(read_regular(index), str(index))
    named = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(named, dict):
        raise UserError(f"{index} has no weight_map; expected the index of a checkpoint in several files")
    names = {str(name) for name in named.values()}
    # Only names of its own files: others would leave it.
    if lost := names - {path.name for path in folder.glob("*.safetensors")}:
        raise UserError(f"{index} names {some(lost)}, which the folder does not hold; fetch the checkpoint again")
    return names


def load_weights(
    auto_class: Any, folder: Path, *, nothing_else: bool = False, trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """A model all of whose weights are in `weight_files`.

    The library gives those that are not there random values and only logs it: each load would be another model.

    Args:
        auto_class: of the library, with `from_pretrained`.
        folder: the checkpoint.
        nothing_else: whether the files may hold no other tensors either, as in checkpoints made here. Published ones
            hold some that no class reads.
        trust_remote_code: whether its configs may name code, which is run.
        settings: for `from_pretrained`; `device_map="meta"` reads headers only. A quantized model is loaded on the GPU
            when there is one, and stays there.

    Raises:
        UserError: As `load_config`, `check_files` and `load_quantized`; if no model can be built from the config, or a
            tensor is missing or has another shape than the config asks for.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_files(folder)
    load = partial(_loaded, auto_class, folder, nothing_else, trust_remote_code)
    if scheme_of(config) is not None:
        dense = partial(auto_class.from_config, config, trust_remote_code=trust_remote_code)
        return load_quantized(lambda how: load({**settings, **how}), folder, weight_files(folder), config, dense)
    if trust_remote_code:
        return load(settings)
    # What the files lack, the library makes in the size that the config says: any size, so without memory first.
    with unfit_named(folder), _without_its_report():
        checked = load({**settings, "device_map": "meta"})
    return checked if settings.get("device_map") == "meta" else load(settings)


@contextmanager
def _without_its_report() -> Iterator[None]:
    """Keeps the library from logging each tensor that it did not expect, which it logs again when it loads them."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _loaded(
    auto_class: Any, folder: Path, nothing_else: bool, trust_remote_code: bool, settings: dict[str, Any]
) -> PreTrainedModel:
    loaded: PreTrainedModel
    loaded, found = auto_class.from_pretrained(
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    check_complete(found, folder, nothing_else=nothing_else)
    return loaded


def check_complete(found: dict[str, Any], where: Path, *, nothing_else: bool = False) -> None:
    """Refuses a model some of whose weights its files lack, by what the library says of its loading.

    Raises:
        UserError: If any is missing or of another shape, or with `nothing_else` unexpected.
    """
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
            f"the weight files of {where} do not hold the model that its config.json describes ({listed}); what is "
            "missing would be random numbers. Fetch the checkpoint again, or save the model that it was made from again"
        )


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of `weight_files`."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are; "none" for none."""
    first, rest = sorted(names)[:3], sorted(names)[3:]
    return (", ".join(first) or "none") + (f" and {len(rest)} more" if rest else "")
