"""A model is not changed while another thread runs it, whose forward would go on with blocks that prune otherwise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .errors import PruneStateError

changing = threading.RLock()
"""Held while a model is looked at and changed: of two threads that prune one, the second sees it pruned."""


@contextmanager
def nobody_runs(model: nn.Module) -> Iterator[None]:
    """Change a model in a ``with`` block; one thread does at a time, and a forward costs nothing for it.

    Raises:
        PruneStateError: another thread runs the model, or something that calls it as its own (``generate``). It goes on
            undisturbed. A forward that begins within the block raises the same. Or this is a hook of its own forward.
    """
    from transformers import PreTrainedModel

    with changing, ExitStack() as undo:
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                undo.callback(part.register_forward_pre_hook(_refuse, prepend=True).remove)
        # Now no forward begins that is not seen here: a call looks up its hooks in a frame of the module.
        modules = {id(module) for module in model.modules()}
        for thread, top in sys._current_frames().items():
            own = thread == threading.get_ident()
            frame: Any = top
            while frame is not None:
                of_model = frame.f_code.co_varnames[:1] == ("self",) and id(frame.f_locals.get("self")) in modules
                if own and of_model and frame.f_code is nn.Module._call_impl.__code__:  # not any method of it
                    raise PruneStateError(
                        f"this {type(model).__name__} is running, and would go on with blocks that are pruned "
                        "otherwise. Prune or unprune it between its forwards, not in a hook of one"
                    )
                if of_model and not own:
                    raise PruneStateError(
                        f"another thread is running this {type(model).__name__}, in {frame.f_code.co_name}, and would "
                        "go on with blocks that are pruned otherwise. Prune before threads start, or change the model "
                        "and call it under one lock"
                    )
                frame = frame.f_back
        yield


def _refuse(module: nn.Module, args: Any) -> None:
    raise PruneStateError(
        f"this {type(module).__name__} is being pruned or unpruned by another thread at this moment; call it again"
    )
