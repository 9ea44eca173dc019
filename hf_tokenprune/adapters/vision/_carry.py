"""What pruned blocks of one forward tell each other: sizes of merged tokens, and who stands for the patches that left.

It travels as a keyword argument through the encoder, like the captured signals: no state on modules. Everything is kept
by block, because gradient checkpointing runs blocks once more, last one first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...signals import Merging, Reduction
from ...tokens import gather_tokens, row_numbers

CARRY_ARGUMENT = "token_prune_carry"


class Carry:
    """By block, what enters it.

    No dataclass: FSDP with mixed precision gives every block a copy of those among its arguments.

    Attributes:
        exact: whether the last block may leave out what the head does not read.
        attentions: whether the caller wants the maps of attention.
        sizes: (B, P + N) float32, patches that each token stands for; no entry: one each.
        owner: (B, M) int64, place among the N prunable tokens of the one that stands for each of the M original ones;
            -1: it has left.
        left: (B, M, D), last states of those that have left; no entry: none has.
    """

    def __init__(self, exact: bool, attentions: bool = False) -> None:
        self.exact = exact
        self.attentions = attentions
        self.sizes: dict[int, Tensor] = {}
        self.owner: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        self._numbers: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None  # the last one, behind the sizes that it is of

    def row_numbers(self, tokens: Tensor) -> Tensor:
        """See ``tokens.row_numbers``; in a forward tokens become fewer, so that the first ones do for all layers."""
        if self._numbers is None or self._numbers.device != tokens.device:
            self._numbers = row_numbers(tokens)
        return self._numbers

    def on_device(self, layer: int, device: torch.device) -> None:
        """Take what enters a block to where it runs. accelerate moves the tensors among its arguments, not these."""
        for entries in (self.sizes, self.owner, self.left):
            if layer in entries:
                entries[layer] = entries[layer].to(device)

    def bias(self, layer: int) -> Tensor | None:
        """(B, 1, 1, P + N) float32 for the attention logits: a token of size s counts like s tokens (ToMe, eq. 1)."""
        sizes = self.sizes.get(layer)
        if sizes is None:
            return None
        if self._bias is None or self._bias[0] is not sizes:
            self._bias = (sizes, sizes.log()[:, None, None])
        return self._bias[1]

    def on_block(self, layer: int) -> None:
        """A block in which nothing leaves: the next one is entered by the same tokens."""
        for entries in (self.sizes, self.owner, self.left):
            if layer in entries:
                entries[layer + 1] = entries[layer]

    def remember(self, layer: int, reduction: Reduction | Merging, tokens: Tensor, num_protected: int) -> None:
        """``tokens`` (B, P + N, D) are about to become those of ``reduction``."""
        tokens = tokens[:, num_protected:]
        batch, entering, width = tokens.shape
        stands = owner_of(reduction, entering)
        owner, left = self.owner.get(layer), self.left.get(layer)
        if left is None and _stays_of(reduction) == entering:  # nothing has left: merging alone needs no states
            self.owner[layer + 1] = stands if owner is None else stands.gather(1, owner)
            return
        if owner is None:
            owner = torch.arange(entering, device=tokens.device).expand(batch, -1)
        if left is None:
            left = tokens.new_zeros(batch, owner.shape[1], width)
        place = owner.clamp(min=0)
        after = torch.where(owner >= 0, stands.gather(1, place), -1)
        leaving = (owner >= 0) & (after < 0)
        self.left[layer + 1] = torch.where(leaving.unsqueeze(-1), gather_tokens(tokens, place), left)
        self.owner[layer + 1] = after

    def restored(self, layer: int, tokens: Tensor, num_protected: int) -> Tensor:
        """(B, P + N, D) that left ``layer`` as (B, P + M, D): every patch has the state of who stands for it, or its
        own last one."""
        owner, left = self.owner.get(layer + 1), self.left.get(layer + 1)
        if owner is None:
            return tokens
        patches = gather_tokens(tokens[:, num_protected:], owner if left is None else owner.clamp(min=0))
        if left is not None:
            patches = torch.where((owner >= 0).unsqueeze(-1), patches, left)
        return torch.cat([tokens[:, :num_protected], patches], dim=1)


def _stays_of(reduction: Reduction | Merging) -> int:
    """How many of the entering tokens survive, or are merged into one that does."""
    return reduction.keep.shape[1] + (reduction.into.shape[1] if isinstance(reduction, Merging) else 0)


def owner_of(reduction: Reduction | Merging, entering: int) -> Tensor:
    """(B, N) int64: the survivor that stands for each token that entered; -1: none does."""
    keep = reduction.keep
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    owner = torch.full((keep.shape[0], entering), -1, device=keep.device).scatter(1, keep, places)
    if isinstance(reduction, Reduction):
        return owner
    return owner.scatter(1, reduction.merged, reduction.into - reduction.num_protected)


def check_bias(implementation: str | None) -> None:
    """Raise UnsupportedModelError for an attention that takes no bias for the sizes of merged tokens."""
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention {implementation!r} takes no bias for the sizes of merged tokens; load the model with "
            'attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
        )


@dataclass
class StartCarry:
    """Forward pre-hook of the encoder: sends a ``Carry`` along. Importable, so that a model can be pickled.

    Attributes:
        proportional: sizes bias the attention, which may have been changed since ``prune``.
    """

    proportional: bool

    def __call__(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.proportional:
            config: Any = encoder.config
            check_bias(config._attn_implementation)
        attentions = wants(encoder, kwargs, "output_attentions")
        # The exact last block serves neither request, and in training dropout would differ.
        exact = not (encoder.training or attentions or wants(encoder, kwargs, "output_hidden_states"))
        return args, {**kwargs, CARRY_ARGUMENT: Carry(exact, attentions)}


@dataclass
class RestoreStates:
    """Forward hook of the encoder: all hidden states get their full length back, as the last block's has already."""

    num_protected: int

    def __call__(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not wants(encoder, kwargs, "output_hidden_states"):
            return
        if isinstance(output, tuple):
            raise UnsupportedModelError(
                "restore: hidden states get their full length back by their name; call the model with return_dict=True"
            )
        carry: Carry = kwargs[CARRY_ARGUMENT]
        *states, last = output.hidden_states

        def restored(layer: int, tokens: Tensor | None) -> Tensor | None:
            if tokens is None:  # one that the caller has not asked for
                return None
            carry.on_device(layer, tokens.device)
            return carry.restored(layer - 1, tokens, self.num_protected)

        output.hidden_states = (*map(restored, range(len(states)), states), last)


def wants(encoder: nn.Module, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a call asks for what ``name``, such as "output_attentions", stands for."""
    value = kwargs.get(name, getattr(encoder.config, name, None))
    return value is not None and value is not False
