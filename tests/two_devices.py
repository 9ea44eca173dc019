"""Devices that are not there: tensors that say they are on one, and an error where tensors of two meet.

All of them lie in the memory of the CPU. Inside ``Devices`` a tensor has the device that it was put on; results
are where their inputs are; ``to`` moves; anything else that mixes devices raises, as CUDA would. ``spread`` puts
modules on devices and moves what they are given, as accelerate does for a ``device_map``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
_MOVES = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type, Tensor.copy_}


class Devices(TorchFunctionMode):
    """A mode in which tensors have the device that ``put`` or ``device=`` gave them; others are on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return device_of(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {device_of(tensor) for tensor in tensors if tensor.dim() or device_of(tensor) != CPU}
        if func is Tensor.__getitem__ and len(devices) > 1:
            devices.discard(CPU)  # where an index may be
        if func is torch.histc:  # of integers on CUDA alone
            args = (args[0].float(), *args[1:])
        wanted = _wanted(func, args, kwargs)
        if func not in _MOVES and len(devices) > 1:
            names = sorted(map(str, devices))
            raise RuntimeError(f"Expected all tensors to be on the same device, {func.__name__} got {names}")
        if func is Tensor.to:
            args, kwargs = _without_device(args, kwargs)
            result = func(*args, **kwargs) if len(args) > 1 or kwargs else args[0]
            if wanted is not None and wanted != device_of(args[0]):
                return put(result.view_as(result), wanted)
            return put(result, device_of(args[0]))
        if kwargs.get("device") is not None and wanted != torch.device("meta"):
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if isinstance(result, torch.Size):
            return result
        here = wanted or next(iter(devices), CPU)
        return tree_map_only(Tensor, lambda tensor: put(tensor, here), result)


def _wanted(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names; None: none."""
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
        return device_of(args[1])
    named = kwargs.get("device")
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
        named = args[1]
    return None if named is None else torch.device(named)


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    args = tuple(arg for i, arg in enumerate(args) if i == 0 or not isinstance(arg, (str, torch.device)))
    return args, {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}


def device_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "emulated_device", CPU)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Say that ``tensor`` is on ``device``, itself."""
    tensor.emulated_device = device  # type: ignore[attr-defined]
    return tensor


def send(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dictionaries on ``device``, new ones where they were on another."""
    return tree_map_only(Tensor, lambda t: t if device_of(t) == device else put(t.view_as(t), device), value)


def spread(module: nn.Module, device: torch.device) -> None:
    """Put a module on ``device``; what it is given moves there. Caches do not: they hold layers of several devices."""
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, device)

    def align(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        stay = {name: value for name, value in kwargs.items() if name in ("cache", "past_key_values")}
        moving = {name: value for name, value in kwargs.items() if name not in stay}
        return send(args, device), {**send(moving, device), **stay}

    module.register_forward_pre_hook(align, with_kwargs=True)
