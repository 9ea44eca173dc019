"""Changing the class of one block and back.

A swapped class survives deepcopy, pickle, gradient checkpointing and torch.compile, which instance forwards and
closures do not. accelerate, though, keeps a bound ``forward`` on the instance; it has to follow the class. And FSDP2
makes of a block's class another one that mixes ``FSDPModule`` in before it; so does what takes its place.
"""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from ..errors import PruneStateError, UnsupportedModelError

CHECKPOINT = "_gradient_checkpointing_func"
"""Where Transformers keeps the function that runs a block, and runs it again for the backward."""


class SwappedBlock(nn.Module):
    """Base of the classes that stand in for stock blocks.

    Gradient checkpointing runs a block once more in the backward. By then it may be a stock one again, or one that is
    pruned otherwise, whose gradients would be of another forward.
    """

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        if CHECKPOINT not in self.__dict__:
            raise AttributeError(CHECKPOINT)
        checkpoint, as_it_was = self.__dict__[CHECKPOINT], (type(self), self.__dict__.get("token_prune"))

        def checked(run: Callable[..., Any], *args: Any) -> Any:
            def unchanged(*again: Any) -> Any:
                block_class, state = as_it_was
                if type(self) is not block_class or self.__dict__.get("token_prune") is not state:
                    raise PruneStateError(
                        "gradient checkpointing runs blocks again in the backward, and this model was unpruned, or "
                        "pruned otherwise, after the forward: call backward before that, inside the with block of "
                        "pruned(model, config)"
                    )
                return run(*again)

            return checkpoint(unchanged, *args)

        return checked

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Callable[..., Any]) -> None:
        self.__dict__[CHECKPOINT] = checkpoint


def check_swappable(block: nn.Module, stock_class: type[nn.Module], place: str) -> None:
    """Raise UnsupportedModelError unless ``block`` is a plain ``stock_class`` whose forward nobody has replaced."""
    if own_class(block) is not stock_class:
        raise UnsupportedModelError(
            f"{place} is a {type(block).__module__}.{type(block).__qualname__}, expected {stock_class.__qualname__}: "
            "undo other changes to the model (or unwrap it) before pruning"
        )
    forward = block.__dict__.get("forward")
    hooked_by_accelerate = "_old_forward" in block.__dict__
    if forward is not None and not hooked_by_accelerate and not _is_own_forward(block, forward):
        raise UnsupportedModelError(f"{place} has a forward of its own ({forward!r}); remove it before pruning")


def check_copies(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raise UnsupportedModelError where PEFT's ``modules_to_save`` has a copy of a block, or of its attention.

    One of the two would be pruned and the other not, or other than it was when it was copied.
    """
    parts = {
        part for block in blocks for part in (block, *block.children()) if part is block or hasattr(part, "config")
    }
    for name, module in model.named_modules():
        if len(with_copies(module)) > 1 and not parts.isdisjoint(module.modules()):
            raise UnsupportedModelError(
                f"PEFT keeps a copy of {name!r}, which pruning changes: leave it out of modules_to_save, and train "
                "it by adapters (target_modules)"
            )


def with_copies(module: nn.Module) -> list[nn.Module]:
    """The module, or the original and the copies that a wrapper of PEFT has (``modules_to_save``)."""
    children = dict(module.named_children())
    if not {"original_module", "modules_to_save"} <= children.keys():
        return [module]
    return [children["original_module"], *children["modules_to_save"].children()]


def swap_class(block: nn.Module, new_class: type[nn.Module]) -> None:
    """Make ``block`` a ``new_class`` in place; parameters, hooks and attributes stay, and what ``fully_shard`` did."""
    forward = block.__dict__.get("forward")
    if forward is not None and _is_own_forward(block, forward):
        del block.__dict__["forward"]  # what accelerate's remove_hook_from_module leaves behind
    mixin: Any = _mixed_in(type(block))
    wanted: Any = new_class
    block.__class__ = wanted if mixin is None else _mixed(mixin, wanted, type(block).__dict__["__deepcopy__"])
    if "_old_forward" in block.__dict__:
        block.__dict__["_old_forward"] = MethodType(type(block).forward, block)


def own_class(block: nn.Module) -> Any:
    """The class of a block, or of a model, without what FSDP2 mixes in before it."""
    return type(block) if _mixed_in(type(block)) is None else type(block).__bases__[1]


def _mixed_in(block_class: type) -> type | None:
    """The class that FSDP2 has mixed in; None: it has not. Nothing of it is here before somebody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and issubclass(block_class, fsdp.FSDPModule) and len(block_class.__bases__) == 2
    return block_class.__bases__[0] if sharded else None


@cache
def _mixed(mixin: type, block_class: type, deepcopy: object) -> type:
    """A class as ``fully_shard`` makes it."""
    return type(f"FSDP{block_class.__name__}", (mixin, block_class), {"__deepcopy__": deepcopy})


def _is_own_forward(block: nn.Module, forward: object) -> bool:
    return isinstance(forward, MethodType) and forward.__self__ is block and forward.__func__ is type(block).forward
