"""Devices that are not here, for what is spread over several: real values, and an error wherever two devices mix.

A tensor says that it is on such a device and holds its values on the CPU. An operation on tensors of two devices
raises, as it does on real ones. So a model that is spread over them gives the values of one, or what was not moved is
seen. For a process of its own: torch takes one such backend, and keeps it.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "pretended"
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_TAKES_CPU_INDICES = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class _Backend:
    """What torch asks of the module of a backend."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 8

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on another device than its values."""

    values: Tensor
    claimed: torch.device

    @staticmethod
    def __new__(cls, values: Tensor, claimed: torch.device) -> "PretendedTensor":
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            dispatch_device=True,
        )
        made.values, made.claimed = values, claimed
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.values!r} on {self.claimed}"

    def tolist(self) -> Any:
        # The library's own reads the memory.
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        return _run(func, args, kwargs or {})


class PretendedDevices(TorchDispatchMode):
    """Inside the block tensors can be made on pretended devices and moved to them."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[int, ...]] = []
        """Shapes of what went from one pretended device to another."""
        self.bytes = self.most_bytes = 0
        """Of the tensors that operations made on pretended devices: now, and at most."""
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        result = _run(func, args, kwargs or {})
        if func in _MOVES:
            source = args[1 if func is torch.ops.aten.copy_.default else 0]
            kinds = {source.device.type, result.device.type}
            if kinds == {KIND} and source.device != result.device:
                self.crossings.append(tuple(source.shape))
        for leaf in tree_leaves(result):
            if isinstance(leaf, PretendedTensor):
                self._count(leaf.values.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # Views share it.
        if (number := storage._cdata) not in self._held:
            self._held[number] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self.bytes)
            weakref.finalize(storage, self._forget, number)

    def _forget(self, number: int) -> None:
        self.bytes -= self._held.pop(number)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs it on the values; what it makes is on the device of its tensors, or on that which it names."""
    asked = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # A number on the CPU goes with any device.
    found = {one.device for one in tensors if one.dim() or one.device.type == KIND}
    if func in _TAKES_CPU_INDICES:
        found = {one.device for one in tensors[1:] if one.device.type == KIND} | {tensors[0].device}
    if len(found) > 1 and func not in _MOVES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, found))}")
    where = torch.device(asked) if asked is not None else tensors[0].device if func in _MOVES else None
    if where is None:
        where = next(iter(found), torch.device("cpu"))
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(PretendedTensor, lambda one: one.values, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and tensors:
        # In place: what came is what goes.
        originals = {id(one.values): one for one in tensors if isinstance(one, PretendedTensor)}
        return tree_map_only(Tensor, lambda one: originals.get(id(one), one), result)
    if where.type != KIND:
        return result
    if where.index is None:
        where = torch.device(KIND, 0)
    return tree_map_only(Tensor, lambda one: PretendedTensor(one, where), result)


def register() -> None:
    """Makes torch know the devices; models are loaded before it, as what is replaced here is looked at meanwhile."""
    _setup_privateuseone_for_python_backend(KIND, _Backend())
    make, know_mode = torch.tensor, torch.inference_mode.__init__

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        # The library reads memory, and moves what it made where no mode of Python sees it.
        made = make(tree_map_only(PretendedTensor, lambda one: one.tolist(), data), **kwargs)
        return made if device is None else made.to(device)

    def never(self: Any, mode: bool = True) -> None:
        # In inference mode a view has no version, which one of such a tensor is given.
        know_mode(self, False)

    torch.tensor = tensor
    torch.inference_mode.__init__ = never  # type: ignore[method-assign]
