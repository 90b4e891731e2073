"""A teacher each of whose layers is split over several processes: which can be, the group they form, what they share.

Each process, a *rank*, has some of the heads of each layer, by the plan that transformers has for the decoder.
"""

import math
import os
import socket
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

from stages.attention.capture import AttentionCapture
from stages.checkpoints.quantization_scheme import scheme_of
from storage.errors import UserError

GROUP_TIMEOUT: Final = timedelta(minutes=10)
"""Longest wait for another rank inside one operation; much longer than a forward pass takes."""
SPLIT_DECODERS: Final = frozenset(
    {"gemma3_text", "glm4v_text", "llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text"}
)
"""Decoders of which maps and logits of two processes were compared with those of one
(`tests/stages/teacher/test_tensor_families.py`)."""
_ATTENTION: Final = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
INSTEAD: Final = "set teacher.parallel to layers, which takes every teacher"


def check_split(config: PreTrainedConfig, folder: Path, num_ranks: int, *, trust_remote_code: bool) -> None:
    """Refuses a teacher whose layers cannot be split over so many processes, by its config alone.

    Raises:
        UserError: If it cannot; says what can be done.
    """
    if num_ranks == 1:
        return
    text = config.get_text_config()
    asked = f"{folder} cannot be split over {num_ranks} processes (teacher.parallel: tensor)"
    if trust_remote_code:
        raise UserError(f"{asked}: teacher.trust_remote_code is on, and how code of a checkpoint splits is not known; "
                        f"{INSTEAD}")  # fmt: skip
    if (scheme := scheme_of(config)) is not None:
        raise UserError(f"{asked}: it is quantized ({scheme}), and packed weights are not split; {INSTEAD}")
    if text.model_type not in SPLIT_DECODERS:
        known = ", ".join(sorted(SPLIT_DECODERS))
        raise UserError(f"{asked}: its decoder is of type {text.model_type}, known to work are {known}; {INSTEAD}")
    plan: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if lacking := [name for name, style in _ATTENTION.items() if plan.get(f"layers.*.self_attn.{name}") != style]:
        raise UserError(
            f"{asked}: the plan of this version of transformers for {text.model_type} does not split "
            f"{', '.join(lacking)}; install the tested version, or {INSTEAD}"
        )
    if num_ranks not in splits(text):
        heads = _num_kv_heads(text)
        numbers = ", ".join(map(str, splits(text))) or "no number"
        raise UserError(
            f"{asked}: it has {text.num_attention_heads} heads with {heads} of keys and values, which do not divide by "
            f"{num_ranks}; set extract.gpus_per_worker to one that divides both ({numbers}), or {INSTEAD}"
        )


def splits(text: PreTrainedConfig) -> list[int]:
    """Numbers above 1 that divide the heads of a decoder, and those of keys and values, rising."""
    both = math.gcd(_num_kv_heads(text), text.num_attention_heads)
    return [number for number in range(2, both + 1) if both % number == 0]


def _num_kv_heads(text: PreTrainedConfig) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def split_settings(num_ranks: int) -> dict[str, Any]:
    """Settings of `from_pretrained` that give this process its part; it is in the group already (`join`)."""
    return {"distributed_config": DistributedConfig(tp_size=num_ranks, tp_plan="auto")}


def without_split(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config as it is stored, without what the library notes in it of the split."""
    if getattr(config, "distributed_config", None) is None:
        return config
    plain = deepcopy(config)
    plain.distributed_config = None
    return plain


def join(store: Path, rank: int, num_ranks: int) -> None:
    """Enters the group of all ranks, which meet at a file; on GPUs by NCCL, rank r on the r-th GPU of the process.

    What they say stays on this machine.
    """
    os.environ["LOCAL_RANK"] = str(rank)  # by it the library chooses the GPU
    # Who watches the ranks ends what hangs (`ranks.py`); this would end the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    where: dict[str, Any] = {"backend": "gloo"}
    if "lo" in (name for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        where = {"backend": "nccl", "device_id": torch.device("cuda", rank)}
    meeting = dist.FileStore(str(store), num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(store=meeting, rank=rank, world_size=num_ranks, timeout=GROUP_TIMEOUT, **where)


def leave() -> None:
    """Ends this process's part in a group whose others may be gone; operations under way end with it."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def average_heads(capture: AttentionCapture, num_ranks: int) -> None:
    """Puts into rank 0's capture, of what each rank has the mean of its own heads, the mean of all.

    All ranks have equally many heads. Nothing else of what they captured leaves them.
    """
    if num_ranks == 1:
        return
    for layer, maps_BNN in sorted(capture.maps.items()):
        capture.maps[layer] = _mean(maps_BNN, num_ranks)
    for layer, rows in sorted(capture.answer_maps.items()):
        together_X = _mean(torch.cat([row_aN.flatten() for row_aN in rows]), num_ranks)
        parts = torch.split(together_X, [row_aN.numel() for row_aN in rows])
        capture.answer_maps[layer] = tuple(part_X.view_as(row) for part_X, row in zip(parts, rows, strict=True))


def _mean(of_rank: Tensor, num_ranks: int) -> Tensor:
    total = of_rank.contiguous()
    dist.reduce(total, dst=0)
    return total.div_(num_ranks)
