"""Changing the class of one block and back.

A swapped class survives deepcopy, pickle, gradient checkpointing and torch.compile, which instance forwards and
closures do not. accelerate, though, keeps a bound ``forward`` on the instance; it has to follow the class.
"""

from types import MethodType

from torch import nn

from ..errors import UnsupportedModelError


def check_swappable(block: nn.Module, stock_class: type[nn.Module], place: str) -> None:
    """Raise UnsupportedModelError unless ``block`` is a plain ``stock_class`` whose forward nobody has replaced."""
    if type(block) is not stock_class:
        raise UnsupportedModelError(
            f"{place} is a {type(block).__module__}.{type(block).__qualname__}, expected {stock_class.__qualname__}: "
            "undo other changes to the model (or unwrap it) before pruning"
        )
    forward = block.__dict__.get("forward")
    hooked_by_accelerate = "_old_forward" in block.__dict__
    if forward is not None and not hooked_by_accelerate and not _is_own_forward(block, forward):
        raise UnsupportedModelError(f"{place} has a forward of its own ({forward!r}); remove it before pruning")


def swap_class(block: nn.Module, new_class: type[nn.Module]) -> None:
    """Make ``block`` a ``new_class`` in place; its parameters, hooks and attributes stay."""
    forward = block.__dict__.get("forward")
    if forward is not None and _is_own_forward(block, forward):
        del block.__dict__["forward"]  # what accelerate's remove_hook_from_module leaves behind
    block.__class__ = new_class
    if "_old_forward" in block.__dict__:
        block.__dict__["_old_forward"] = MethodType(new_class.forward, block)


def _is_own_forward(block: nn.Module, forward: object) -> bool:
    return isinstance(forward, MethodType) and forward.__self__ is block and forward.__func__ is type(block).forward
