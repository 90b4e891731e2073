"""Quantizes the decoders of tiny LLaVAs on the spot, in the layouts that published checkpoints have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK, GROUP = 16, 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["re:.*vision.*", "re:.*projector.*", "lm_head"],
}


def make_fp8(folder: Path, llava: Path) -> dict[str, torch.Tensor]:
    """FP8 in blocks, as published checkpoints have it in larger ones; needs no package.

    Returns:
        The weights that it stands for, unpacked by the textbook rule.
    """

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored = {name: codes.reshape(weight.shape), f"{name}_scale_inv": scales}
        return stored, (codes.float() * scales[:, None, :, None]).reshape(weight.shape)

    packed, meant = _packed(llava, pack)
    scheme = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"],
    }
    write(folder, llava, packed, scheme)
    return meant


def make_packed_int4(folder: Path, llava: Path) -> dict[str, torch.Tensor]:
    """4-bit integers in groups, eight to a number of 32 bits, as `compressed-tensors` packs them.

    Returns:
        The weights that it stands for, unpacked by the textbook rule.
    """

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scales).round().clamp(-8, 7).to(torch.int32)
        nibbles = (codes + 8).reshape(weight.shape[0], -1, 8)
        words = (nibbles.long() << (4 * torch.arange(8))).sum(-1)
        stored = {
            f"{name}_packed": (words - (words >= 2**31) * 2**32).to(torch.int32),
            f"{name}_scale": scales[..., 0],
            f"{name}_shape": torch.tensor(weight.shape),
        }
        return stored, (codes * scales).reshape(weight.shape)

    packed, meant = _packed(llava, pack)
    write(folder, llava, packed, INT4)
    return meant


def write(folder: Path, source: Path, tensors: dict[str, torch.Tensor], scheme: dict[str, Any]) -> None:
    """The checkpoint `source` with other tensors, and this scheme in its config."""
    shutil.copytree(source, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))


def _packed(
    llava: Path, pack: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All tensors with those of the decoder packed, and what they stand for."""
    stored, meant = {}, {}
    for name, weight in load_file(llava / "model.safetensors").items():
        tensors, meant[name] = pack(name, weight) if _quantized(name, weight) else ({name: weight}, weight)
        stored |= tensors
    return stored, meant


def _quantized(name: str, weight: torch.Tensor) -> bool:
    return ".layers." in name and "vision" not in name and weight.dim() == 2
