"""The hook behind a pruned language model: full length again, and what the cache must know from now on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...tokens import gather_tokens
from ._cache import CACHE_NAME, CacheState, PrunedDynamicCache, Segment, bind
from ._forward import Forward
from ._images import ARGUMENT
from ._view import View


class LeaveDecoder:
    """Forward hook of the language model: full length again, and the cache learns what it holds."""

    def __call__(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        forward: Forward | None = kwargs.get(ARGUMENT)
        cache = output.get(CACHE_NAME)
        if isinstance(cache, PrunedDynamicCache):
            cache.open = False
        if forward is None or forward.layout is None:
            return output
        output.last_hidden_state = restored(forward, output.last_hidden_state, forward.views[-1])
        if output.hidden_states is not None:
            inputs = [
                None if states is None else restored_input(forward, states, layer)
                for layer, states in enumerate(output.hidden_states[:-1])
            ]
            output.hidden_states = (*inputs, output.last_hidden_state)
        if cache is not None and cache.get_seq_length():
            bind(cache, cache_state(forward))
        return output


def restored(forward: Forward, states: Tensor, view: View) -> Tensor:
    """(B, L, D) as (B, T, D): where a token left, the state of the last one before it that stayed.

    So logits, labels and losses keep their places.
    """
    view = view.on(states.device)
    batch, length = view.slots.shape
    present = torch.zeros(batch, forward.length, dtype=torch.long, device=states.device)
    ones = torch.ones_like(view.slots) if view.valid is None else view.valid.long()
    number = present.scatter_add_(1, view.slots, ones).cumsum(1)
    first = length - number[:, -1:]
    full = gather_tokens(states, first + (number - 1).clamp(min=0))
    return full if forward.packed is None else forward.packed.pack(full)


def restored_input(forward: Forward, states: Tensor, layer: int) -> Tensor:
    """``restored`` for what the layer before ``layer`` gave: without the tokens that leave in this one."""
    index = forward.segment(layer)
    view = forward.views[index].on(states.device)
    arriving = layer > 0 and layer == forward.starts[index]
    return restored(forward, view.taken(states) if arriving else states, view)


def cache_state(forward: Forward) -> CacheState:
    """What the next forward with this cache must know."""
    lengths = [held + view.slots.shape[1] for held, view in zip(forward.held, forward.views, strict=True)]
    segments = [Segment(first, v.key_valid, v.shift) for first, v in zip(forward.starts, forward.views, strict=True)]
    assert forward.layout is not None
    layout = forward.layout
    tail = min(
        tail if any(images) else length
        for tail, images, length in zip(layout.tail, layout.images, layout.lengths, strict=True)
    )
    return CacheState(forward.seen + forward.length, segments, lengths, tail)
