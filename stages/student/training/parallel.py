"""How a stage is spread over processes: a copy of the student in each (DDP), or a part of each parameter (FSDP2).

FSDP2 is torch's own `fully_shard`, not Accelerate's wrapping of it, which does not run on CPUs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from stages.student.training.train_config import Strategy


def spread(objective: nn.Module, decoder: PreTrainedModel, accelerator: Accelerator, strategy: Strategy) -> nn.Module:
    """The objective as each process calls it, on its device.

    With "fsdp" the parameters of `objective` become DTensors in place; make the optimizer afterwards. Its forward pass
    then gathers each decoder layer's parameters when they are needed, so every process must run every layer.

    The layers of `decoder`, a part of it, are sharded one by one; all else is one group. One process wraps nothing.
    """
    if strategy == "ddp" or accelerator.num_processes == 1:
        prepared: nn.Module = accelerator.prepare(objective)
        return prepared
    objective.to(accelerator.device)
    # Without image features nothing that enters the first layer would learn. Its gradients would be exchanged last
    # then, but in order by a process that has images: each would wait for another layer's.
    decoder.enable_input_require_grads()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


@contextmanager
def gradients_stay(objective: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gradients of backward passes inside are added up in each process, and exchanged by the first pass after it."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(False)
        yield
        objective.set_requires_gradient_sync(True)
        return
    with accelerator.no_sync(objective):
        yield


@contextmanager
def evaluation_mode(objective: nn.Module) -> Iterator[None]:
    """Forward passes inside are without dropout and gradients; after it the objective is trained as before."""
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        objective.train()
        if isinstance(objective, FSDPModule):
            # A forward pass leaves the outermost parameters whole until a backward pass. The optimizer's state and the
            # checkpoint know their parts only.
            objective.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients of all processes down to that norm together; the norm before, the same in each."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(tensors: Mapping[str, Tensor], *, wanted: bool) -> dict[str, Tensor]:
    """Parameters, or what is kept of them, each in one piece on the CPU.

    All processes must call this, with the same names in the same order. Where it is not `wanted`, nothing is copied to
    the CPU or returned, and each tensor is dropped as soon as the others have this process's part.
    """
    found = {}
    for name, tensor in tensors.items():
        one = tensor.detach()
        if isinstance(one, DTensor):
            one = one.full_tensor()
        if wanted:
            found[name] = one.cpu().contiguous()
    return found


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that belongs beside this process's part of the parameter."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Each process has read the same file: nothing is sent.
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
