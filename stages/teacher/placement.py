"""Where the parts of a teacher are: all on one device, or its layers in a row over several GPUs.

Nothing else knows it. A layer's queries and keys say where its maps are made, and hooks of Accelerate move what enters
a module to where that module computes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from storage.errors import UserError

MEMORY_FOR_WEIGHTS = 0.9
"""Of a GPU's free memory; activations have what the weights leave."""


def over_gpus(num_gpus: int) -> dict[str, Any]:
    """Settings of `from_pretrained` that spread a model's layers over GPUs, about as many bytes on each.

    One GPU, or none, needs no settings.

    Raises:
        UserError: If this process sees fewer GPUs.
    """
    if num_gpus <= 1:
        return {}
    check_gpus(num_gpus)
    free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(num_gpus)}
    return {
        "device_map": "balanced",
        "max_memory": {gpu: int(MEMORY_FOR_WEIGHTS * num_bytes) for gpu, num_bytes in free.items()},
    }


def check_gpus(num_gpus: int) -> None:
    """Refuses to go on with fewer GPUs than asked for.

    Raises:
        UserError: If this process sees fewer.
    """
    if (found := torch.cuda.device_count()) < num_gpus:
        raise UserError(
            f"this process sees {found} GPUs that torch can use, extract.gpus_per_worker asks for {num_gpus}; set it "
            "to what a machine has, or mend the driver of this one"
        )


@contextmanager
def left_over_refused(num_gpus: int) -> Iterator[None]:
    """Says, where the library asks for a folder, that a model's weights do not fit into the GPUs.

    Raises:
        UserError: If it does.
    """
    try:
        yield
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise _does_not_fit(num_gpus, "a part of them is left over") from error


def check_fits(model: PreTrainedModel, num_gpus: int) -> None:
    """Refuses a model of which the library left a part outside the GPUs: it would be read again in every pass.

    Raises:
        UserError: If there is such a part.
    """
    parts: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    left = [name for name, device in parts.items() if device in ("cpu", "disk")]
    if left:
        raise _does_not_fit(num_gpus, f"{len(left)} of {len(parts)} parts are left over, the first is {left[0]}")


def _does_not_fit(num_gpus: int, found: str) -> UserError:
    return UserError(
        f"the teacher's weights do not fit into {num_gpus} GPUs: {found}; set extract.gpus_per_worker to more, or name "
        "a quantized checkpoint"
    )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its hook says so, whose weights may lie elsewhere, or else its weights do."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        for weight in part.parameters(recurse=False):
            return weight.device
    raise ValueError(f"{type(module).__name__} has no weights")


def gpus_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The GPUs that hold weights of a model, in the order of its layers."""
    return tuple(dict.fromkeys(weight.device for weight in model.parameters() if weight.device.type == "cuda"))


def most_common_device(tensors: Sequence[Tensor]) -> torch.device:
    """The device of most of them, the first of equals: gathering them there moves the least."""
    return Counter(tensor.device for tensor in tensors).most_common(1)[0][0]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.stack`, of what layers on several devices made."""
    device = most_common_device(tensors)
    return torch.stack([tensor.to(device) for tensor in tensors])


@contextmanager
def on_streams(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Inside the block the calling thread's kernels go to these streams, one for each GPU."""
    with ExitStack() as entered:
        # The GPU of the last that is entered is the current one: the first, as outside.
        for stream in reversed(streams):
            entered.enter_context(torch.cuda.stream(stream))
        yield
