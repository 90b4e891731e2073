"""Quantized checkpoints: what their config says of it, who may load them, and how they are loaded."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from stages.checkpoints.configs import unfit_named
from stages.checkpoints.quantization_scheme import BITSANDBYTES, KEY, bits_of, method_of, scheme_of, scheme_settings
from storage.digests import parse_object
from storage.errors import UserError, first_line

_DEQUANTIZED = ("compressed-tensors", "fp8", "mxfp8", "mxfp4")
"""Methods whose weights the library can unpack while it loads them. It is asked to: results are then the same on every
device, and no kernels are fetched from a hub."""
_MOST_PER_BYTE = 8
"""Weights that a byte of a checkpoint stands for at most: those of one bit."""
_QUANT_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 2**16


def check_packages(config: PreTrainedConfig, folder: Path) -> None:
    """Refuses a quantized checkpoint for which a package is missing here, before its weights are read.

    Whether a device can run it is seen where it is loaded: this may be another machine.

    Raises:
        UserError: If one is missing, which is named, or the library does not know the scheme.
    """
    settings = scheme_settings(config)
    if settings is None:
        return
    if (known := _known(settings)) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UserError(
            f"{folder} is quantized with {method_of(settings)}, which this version of transformers does not load; "
            f"it loads {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )
    with _loading_named(config, folder):
        quantizer = AUTO_QUANTIZER_MAPPING[known](AUTO_QUANTIZATION_CONFIG_MAPPING[known].from_dict(settings))
        with suppress(RuntimeError):  # no device for it
            quantizer.validate_environment(device_map=None)


def bits_per_weight(config: PreTrainedConfig) -> int | None:
    """Bits of a weight of the decoder in memory; None if it is loaded as a float, or the config does not say."""
    settings = scheme_settings(config)
    return None if settings is None or method_of(settings) in _DEQUANTIZED else bits_of(settings)


def load_quantized(load: Any, folder: Path, files: list[Path], config: PreTrainedConfig, dense: Any) -> PreTrainedModel:
    """Loads a quantized model on the device that it stays on.

    Args:
        load: Called with the settings for `from_pretrained`.
        folder: The checkpoint.
        files: Its weights.
        config: Its config.
        dense: Makes the model that the config describes without weights, on the device that torch is told.

    Raises:
        UserError: As `check_packages`; if the config describes far more than the files can hold, or the library cannot
            load it on this machine.
    """
    check_packages(config, folder)
    with torch.device("meta"), unfit_named(folder):
        expected: PreTrainedModel = dense()
    check_sizes(expected, folder, files)
    settings: dict[str, Any] = {"device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}}
    if method_of(found := scheme_settings(config) or {}) in _DEQUANTIZED:
        settings["config"] = type(config).from_dict(config.to_dict() | {KEY: {**found, "dequantize": True}})
    with _loading_named(config, folder):
        model: PreTrainedModel = load(settings)
    return model


def place(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Moves a model to a device; a quantized one stays where it was loaded, as some cannot be moved."""
    placed: PreTrainedModel = model if getattr(model, "is_quantized", False) else model.to(device)
    return placed


def without_scheme(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without what it says of quantization, in the whole or in its decoder."""
    fields = config.to_dict()
    for part in (fields, fields.get("text_config")):
        if isinstance(part, dict):
            part.pop(KEY, None)
    plain: PreTrainedConfig = type(config).from_dict(fields)
    return plain


def is_packed(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of these weights is packed: whole numbers, or floats of a byte."""
    # Whole numbers of 64 bits are positions.
    return any(
        tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.dtype == torch.int64)
        for tensor in tensors.values()
    )


def _known(settings: Mapping[str, Any]) -> str:
    """The name by which the library has the method."""
    if (method := method_of(settings)) != BITSANDBYTES:
        return method
    return f"{method}_{4 if settings.get('load_in_4bit') else 8}bit"


@contextmanager
def _loading_named(config: PreTrainedConfig, folder: Path) -> Iterator[None]:
    """What the library raises for packages or devices that it lacks says which checkpoint wanted them."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{folder} is quantized ({scheme_of(config)}), and a package that loads it is missing here: "
            f"{first_line(error)}. Install it wherever the teacher runs, or name a checkpoint that is not quantized"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder} is quantized ({scheme_of(config)}) and cannot be loaded here: {type(error).__name__}: "
            f"{first_line(error)}; expected what this scheme's package can load on this device"
        ) from error


def check_sizes(expected: PreTrainedModel, folder: Path, files: list[Path]) -> None:
    """Packed weights have other shapes than the config says, so the sum of all of them is compared.

    `expected` is the model without packing, on no device. The shapes that bitsandbytes keeps beside its weights, and
    allocates, are looked for among those of the model.
    """
    num_weights = sum(parameter.numel() for parameter in expected.parameters())
    num_bytes = sum(file.stat().st_size for file in files)
    if num_weights > _MOST_PER_BYTE * num_bytes:
        raise UserError(
            f"the config.json of {folder} describes {num_weights:,} weights, its files have {num_bytes:,} bytes: no "
            "quantization packs so many; fetch the checkpoint again"
        )
    shapes = {tuple(parameter.shape) for parameter in expected.parameters()}
    for file, name, said in _stated_shapes(files):
        if said not in shapes:
            raise UserError(f"{file} says that {name} has shape {list(said)}, which the model does not have; fetch it")


def _stated_shapes(files: list[Path]) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                if _QUANT_STATE not in name:
                    continue
                state = file.get_slice(name)
                said: Any = None
                if state.get_dtype() == "U8" and math.prod(state.get_shape()) <= _MAX_STATE_BYTES:
                    packed = bytes(file.get_tensor(name).tolist())
                    said = parse_object(packed, f"{path}: {name}", "fetch the checkpoint again").get("shape")
                yield path, name.split(_QUANT_STATE)[0], tuple(said) if isinstance(said, list) else ()
