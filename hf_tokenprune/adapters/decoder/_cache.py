"""A key-value cache whose layers hold different tokens, and what later forwards must know about them.

What a decode step needs lives on the cache object: it dies with it, follows it through ``copy``, beam search and
cropping, and two generations with one model cannot mix it up.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.masking_utils import create_causal_mask

from ...errors import PruneStateError, UnsupportedModelError

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this version of Transformers calls the cache in arguments and outputs: "cache" from 5.24 on."""


@dataclass
class Segment:
    """What consecutive decoder layers have in common: they hold the same tokens.

    Attributes:
        first: the first of these layers.
        valid: (B, L) bool, which of the L cached tokens are not padding; None: all.
        shift: (B, 1) int64, how far positions of later tokens move down; None: not at all.
    """

    first: int
    valid: Tensor | None
    shift: Tensor | None

    def on(self, device: torch.device) -> Segment:
        """The same with its tensors on ``device``."""
        valid, shift = (rows if rows is None else rows.to(device) for rows in (self.valid, self.shift))
        return Segment(self.first, valid, shift)


@dataclass
class CacheState:
    """The pruned part of a cache.

    Attributes:
        seen: tokens that the caller has fed.
        segments: by segment, what its layers hold of them.
        lengths: how many that are.
        tail: how many of the last ones are text in every sample, which all layers hold.
        cropped: more than these were taken away, so nobody knows what is left.
    """

    seen: int
    segments: list[Segment]
    lengths: list[int]
    tail: int
    cropped: bool = False

    def without_last(self, count: int) -> CacheState:
        """The state before the last ``count`` <= tail tokens came."""
        segments = [replace(s, valid=None if s.valid is None else s.valid[:, :-count]) for s in self.segments]
        return CacheState(self.seen - count, segments, [n - count for n in self.lengths], self.tail - count)


class PrunedDynamicCache(DynamicCache):
    """A ``DynamicCache`` of a pruned decoder. ``get_seq_length()`` tells the tokens that the caller has fed, as
    ``generate`` and hand-written loops expect; ``get_seq_length(layer)`` how many of them that layer holds."""

    token_prune: CacheState
    open: bool = False
    """Whether a pruned model is at work on it. A dense one would get positions and masks wrong without noticing."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_open()
        return super().update(*args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.check_open()  # before recurrent layers, which do not update a length, change their states
        return super().get_mask_sizes(query_length, layer_idx)

    def check_open(self) -> None:
        if not self.open:
            raise PruneStateError(
                "this cache was filled by a pruned model, and the model at work is not pruned; prune it again with the "
                "same config, or start with a new DynamicCache"
            )

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        held = int(super().get_seq_length(layer_idx or 0))
        if layer_idx is not None or held == 0:
            return held
        return held + self.token_prune.seen - self.token_prune.lengths[0]

    def reset(self) -> None:
        super().reset()
        self.__dict__.pop("open", None)
        del self.token_prune
        self.__class__ = DynamicCache  # a cache without tokens is a stock one

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; a positive number is the length to keep, as it was in older versions."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        super().crop(tokens_to_remove)
        excess = self.token_prune.lengths[0] - self.get_seq_length(0)
        if excess > self.token_prune.tail:
            self.token_prune = replace(self.token_prune, cropped=True)
        elif excess > 0:  # assisted decoding feeds candidates with the prompt
            self.token_prune = self.token_prune.without_last(excess)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, change: Any) -> None:
        state = self.token_prune
        segments = [
            replace(s, **{name: change(rows) for name in ("valid", "shift") if (rows := getattr(s, name)) is not None})
            for s in state.segments
        ]
        self.token_prune = replace(state, segments=segments)


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward, under its present or its former name; None: there is none."""
    return kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))


def check_cache(cache: Any) -> None:
    """Raise UnsupportedModelError unless every layer of ``cache`` can hold a length of its own, or has none."""
    if cache is None or (
        isinstance(cache, DynamicCache)
        and all(type(layer) in (DynamicLayer, LinearAttentionLayer) for layer in cache.layers)
    ):
        return
    layers = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
    raise UnsupportedModelError(
        f"image tokens cannot be pruned with a {type(cache).__name__}{f' of {layers}' if layers else ''}: its layers "
        "must be able to hold different lengths. Use a DynamicCache (the default of generate; leave "
        "cache_implementation out), or unprune(model)"
    )


def state_of(cache: Cache | None, starts: list[int]) -> CacheState | None:
    """What former forwards left on ``cache``; None where it holds no pruned tokens.

    Raises:
        PruneStateError: the cache was filled under another config, cropped inside a pruned prompt, or changed by
            something that does not know what its layers hold.
    """
    if not isinstance(cache, PrunedDynamicCache):
        return None
    state = cache.token_prune
    if [segment.first for segment in state.segments] != starts:
        raise PruneStateError("this cache was filled by a model pruned in other layers; start with a new DynamicCache")
    if state.cropped:
        raise PruneStateError(
            "this cache was cropped inside a prompt whose image tokens were pruned; start with a new DynamicCache"
        )
    check_lengths(cache, state)
    return state


def check_lengths(cache: PrunedDynamicCache, state: CacheState) -> None:
    """Raise PruneStateError unless every layer has as many tokens more than its prompt left there as the first one."""
    grown = cache.get_seq_length(0) - state.lengths[0]
    ends = [*(segment.first for segment in state.segments[1:]), len(cache.layers)]
    for segment, end, length in zip(state.segments, ends, state.lengths, strict=True):
        for layer in range(segment.first, end):
            if cache.is_linear[layer]:  # a state, of whatever length
                continue
            held = cache.get_seq_length(layer)
            if grown < 0 or held != length + grown:
                raise PruneStateError(
                    f"layer {layer} of this cache holds {held} tokens, where the pruned prompt left {length}"
                    f"{f' and {grown} came behind it' if grown > 0 else ''}: something other than the model and "
                    "cache.crop changed the cache, such as a method that compresses or evicts keys, or a forward that "
                    "was interrupted. Use either that or pruning; start with a new DynamicCache, or unprune(model)"
                )


@torch.compiler.disable  # it knows no change of class
def bind(cache: Cache, state: CacheState) -> None:
    """Put ``state`` on ``cache``, in place."""
    cache.__class__ = PrunedDynamicCache
    cache.token_prune = state


def extended(valid: Tensor | None, length: int, new: Tensor | None, num_new: int, like: Tensor) -> Tensor | None:
    """(B, length + num_new) bool: ``valid`` (B, length), then ``new`` (B, num_new); None: no padding in either.

    It has batch and device of ``like``.
    """
    if valid is None and new is None:
        return None
    batch = like.shape[0]
    parts = [
        like.new_ones(batch, n, dtype=torch.bool) if part is None else part.to(like.device)
        for part, n in ((valid, length), (new, num_new))
    ]
    return torch.cat(parts, dim=1)
