"""Operations that a forward dispatches: what it costs where tensors are small, and a number without noise.

On a GPU a launch each, or a few, bounds small batches; on a CPU a few microseconds each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what is dispatched in a ``with`` block, by name, but for views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def count_operations(forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> int:
    """How many operations that are no views ``forward(**inputs)`` dispatches, without gradients."""
    # Inference mode would not take composed operations apart, so that one counts for many; nor for tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        with Operations() as operations:
            forward(**inputs)
    return operations.counts.total()
