"""A checkpoint's weights: loaded whole from its files or refused, and their digest."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from stages.checkpoints.configs import load_config, unfit_named
from stages.checkpoints.quantization import load_quantized
from stages.checkpoints.quantization_scheme import scheme_of
from stages.checkpoints.weight_files import check_files, some, weight_files
from storage.errors import UserError


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
        settings: for `from_pretrained`; `device_map="meta"` reads headers only. A quantized model is loaded where
            another `device_map` says, or on the GPU when there is one, and stays there. With `distributed_config` each
            process of a group loads its part.

    Raises:
        UserError: As `load_config`, `check_files` and `load_quantized`; if no model can be built from the config, or a
            tensor is missing or has another shape than the config asks for.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_files(folder)
    load = partial(_loaded, auto_class, folder, nothing_else, trust_remote_code)
    if scheme_of(config) is not None:
        dense = partial(auto_class.from_config, config, trust_remote_code=trust_remote_code)
        # Its weights are packed, so that their headers alone do not say whether they can be loaded.
        placed = {key: settings[key] for key in ("device_map",) if settings.get(key, "meta") != "meta"}
        return load_quantized(
            lambda how: load({**settings, **how, **placed}), folder, weight_files(folder), config, dense
        )
    if trust_remote_code:
        return load(settings)
    # What the files lack, the library makes in the size that the config says: any size, so without memory first.
    with unfit_named(folder), _without_its_report():
        whole = {key: value for key, value in settings.items() if key != "distributed_config"}
        checked = load({**whole, "device_map": "meta"})
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
