"""What one segment of a decoder sees in one forward, on the device of the layer that asks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from ...tokens import gather_tokens
from ._cache import CACHE_NAME


@dataclass
class View:
    """The tokens of this forward that one segment sees: L of the T that came in.

    Attributes:
        slots: (B, L) int64, where they stood among the T.
        take: (B, L) int64, where they stood in the view before.
        columns: (B, L) int64, where they stand in the view of the first segment; None: these are all of them.
        valid: (B, L) bool, False for padding; None: no padding.
        positions: (..., B, L) int64 for the rotary embedding; leading axes, if any, are those of the positions.
        renumbered: their positions are others than in the first segment.
        shift: (B, 1) int64, how far positions behind them move down; None: not at all.
        key_valid: (B, K + L) bool, ``valid`` with that of the K keys in the cache before it; None: no padding.
        merged: (B, L, D) states where ``is_merged`` (B, L) bool: others were merged into these tokens; None: into none.
        rotary, mask: what the layers of the segment are given, unless it is the first one, which is given what stock
            Transformers made; made when the first of them asks.
    """

    slots: Tensor
    take: Tensor
    columns: Tensor | None
    valid: Tensor | None
    positions: Tensor
    renumbered: bool
    shift: Tensor | None
    key_valid: Tensor | None
    merged: Tensor | None = None
    is_merged: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Any = None

    def on(self, device: torch.device) -> View:
        """This view with everything on ``device``: layers of one segment may be spread over several."""
        if self.slots.device == device:
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "renumbered"}
        return replace(self, **{name: moved(value, device) for name, value in tensors.items()})

    def with_states(self, states: Tensor, merged: list[tuple[Tensor, Tensor, Tensor]]) -> View:
        """This view with new states of some tokens.

        Args:
            states: (B, L, D) of the view before.
            merged: samples (g, 1), places (g, n) in the view before, states (g, n, D).
        """
        states, is_merged = states.clone(), torch.zeros_like(states[..., 0], dtype=torch.bool)
        for rows, places, new in merged:
            states[rows, places], is_merged[rows, places] = new.to(states.dtype), True
        return replace(self, merged=gather_tokens(states, self.take), is_merged=is_merged.gather(1, self.take))

    def taken(self, states: Tensor) -> Tensor:
        """``states`` of the view before as (B, L, D) of this one."""
        states = gather_tokens(states, self.take)
        if self.merged is None or self.is_merged is None:
            return states
        return torch.where(self.is_merged.unsqueeze(-1), self.merged, states)

    def make_rotary(self, decoder: Any, states: Tensor, first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cos and sin (B, L, d), taken from those of the ``first`` segment unless tokens have been renumbered since.

        Args:
            decoder: the language model.
            states: (B, L, D) of these tokens.
        """
        if self.renumbered:
            made: tuple[Tensor, Tensor] = moved(decoder.rotary_emb(states, self.positions), states.device)
            return made
        if self.columns is None:
            return first
        cos, sin = first
        index = self.columns.unsqueeze(-1).expand(-1, -1, cos.shape[-1])
        return cos.expand(len(states), -1, -1).gather(1, index), sin.expand(len(states), -1, -1).gather(1, index)

    def make_mask(self, decoder: Any, layer: int, states: Tensor, cache: Cache | None) -> Any:
        """The mask for a decoder layer that attends to all that is in front of a token."""
        if self.key_valid is None and states.shape[1] == 1:
            return None
        # Without position_ids: original positions have gaps, which Transformers would take for packed sequences.
        return create_causal_mask(
            config=decoder.config,
            inputs_embeds=states,
            attention_mask=self.key_valid,
            position_ids=None,
            layer_idx=layer,
            **{CACHE_NAME: cache},
        )


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, a mask or a tuple of them on ``device``; None stays None."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return None if value is None else value.to(device)
