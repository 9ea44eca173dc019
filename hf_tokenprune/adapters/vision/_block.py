"""Blocks of image encoders that drop or merge tokens: the stock block in parts, and what goes on between them.

Axes: B batch, T tokens that enter, P protected ones, n that stay, H heads, D width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import index
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...signals import Merging, Reduction, Stage
from ...tokens import merge_rows, row_numbers, take_rows
from .._capture import CAPTURE_ARGUMENT, Capture, check_all_heads
from .._swap import SwappedBlock
from ._carry import Carry, owner_of


class Recorder(Protocol):
    """Whoever wants to know what left; see ``hf_tokenprune.recording.Record``."""

    def on_start(self) -> None: ...

    def on_reduction(self, name: str, keep: Tensor, owner: Tensor, importance: Tensor | None) -> None: ...

    def on_kept(self, name: str, kept: Tensor) -> None: ...

    def on_block(self, layer: int, num_tokens: int) -> None: ...


@dataclass
class BlockState:
    """What a pruned block knows. No tensors: it is copied, pickled and moved with the module.

    Attributes:
        stage: None for a block that drops nothing itself.
        layer: index of the block.
        num_heads: of its attention.
        proportional: whether sizes of merged tokens bias its attention.
        exact: it is the last block, and computes for protected tokens only what the head reads.
        restore: tokens are remembered, and the last block gives them all back.
        config: of the whole model, set by the engine.
    """

    stage: Stage | None
    num_protected: int
    has_cls: bool
    layer: int
    is_last: bool
    num_heads: int
    proportional: bool = False
    exact: bool = False
    restore: bool = False
    config: Any = None
    recorders: list[Recorder] = field(default_factory=list, compare=False)


class Projections(NamedTuple):
    """What the first half of a block is made of, where it has to run in parts.

    Attributes:
        norm: what stands in front of the attention.
        query, key, value, output: linear layers.
        head_dim, scaling, dropout: of the attention.
    """

    norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    head_dim: int
    scaling: float
    dropout: float


class Decision(NamedTuple):
    """What leaves, and ``Signals.rows`` of what was there."""

    reduction: Reduction | Merging
    rows: Tensor


class PrunedVisionBlock(SwappedBlock):
    """Mixed in before a stock block class; the subclass adds the parts of that block."""

    stock_class: ClassVar[type[nn.Module]]
    no_mask: ClassVar[dict[str, None]] = {"attention_mask": None}
    """What tells the stock block that there is no mask."""
    token_prune: BlockState

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """First half of the block: (B, T, D) with attention and its residual added."""
        raise NotImplementedError

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        """Second half of the block: (B, T, D) with the MLP and its residual added."""
        raise NotImplementedError

    def add_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        """How the first half ends: what the attention returned, (B, n, D), added to the states of the same tokens."""
        raise NotImplementedError

    def projections(self) -> Projections:
        """The modules of the first half."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_prune_carry: Carry | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The stock block, with ``stage.num_kept`` of the prunable tokens going on: (B, T, D) -> (B, P + n, D)."""
        refuse_mask(attention_mask)
        state, carry = self.token_prune, token_prune_carry
        if carry is not None:
            carry.on_device(state.layer, hidden_states.device)
        num_prunable = hidden_states.shape[1] - state.num_protected
        stage = state.stage if state.stage and num_kept(state.stage, num_prunable) < num_prunable else None
        if carry is not None:
            carry.on_block(state.layer)
        bias = carry.bias(state.layer) if carry is not None and state.proportional else None
        if state.exact and carry is not None and carry.exact:
            return self.mlp_half(self._attention_of_few(hidden_states, None, bias, carry))
        if stage is not None and stage.where == "queries":
            tokens = self.mlp_half(self._attention_of_few(hidden_states, stage, bias, carry))
        elif stage is None and bias is None:
            tokens = super().forward(hidden_states, **self.no_mask, **kwargs)
        else:
            capture = Capture(stage.needs if stage else frozenset(), bias)
            # A stock attention function may not know the argument.
            captured = {CAPTURE_ARGUMENT: capture} if capture.needs or bias is not None else {}
            tokens = self.attention_half(hidden_states, **kwargs, **captured)
            if stage is None:
                tokens = self.mlp_half(tokens)
            elif stage.where == "after_block" and stage.reads_tokens:
                tokens = self.mlp_half(tokens)
                tokens = self._reduce(tokens, self._decide(stage, tokens, hidden_states, capture, carry), carry)
            else:
                decision = self._decide(stage, tokens, hidden_states, capture, carry)
                del capture, captured  # the signals are not held while the MLP runs
                if stage.where == "mid_block":
                    tokens = self._reduce(tokens, decision, carry)
                    tokens = self.mlp_half(tokens)
                else:
                    tokens = self._reduce(self.mlp_half(tokens), decision, carry)
        if state.restore and state.is_last and carry is not None:
            return carry.restored(state.layer, tokens, state.num_protected)
        return tokens

    def _attention_of_few(
        self, hidden_states: Tensor, stage: Stage | None, bias: Tensor | None, carry: Carry | None
    ) -> Tensor:
        """The first half with keys and values of all tokens, and the rest for those that stay: (B, T, D) ->
        (B, P + n, D).

        Without a ``stage`` the protected ones stay: then it is exactly that half, for those.
        """
        num_protected, parts = self.token_prune.num_protected, self.projections()
        if stage is not None and carry is not None and carry.attentions:
            raise UnsupportedModelError(
                'output_attentions: with where="queries" no map of all tokens is computed; prune with where="mid_block"'
            )

        def heads(projection: nn.Module, states: Tensor) -> Tensor:
            return projection(states).unflatten(-1, (-1, parts.head_dim)).transpose(1, 2)

        states = parts.norm(hidden_states)
        keys, values = heads(parts.key, states), heads(parts.value, states)
        tokens, states = hidden_states[:, :num_protected], states[:, :num_protected]
        if stage is not None:
            if stage.needs:
                check_all_heads(keys, self.token_prune.num_heads)
            capture = Capture(stage.needs, bias)
            first = keys[:, :, :0]  # nobody asks for it
            if "cls_attention" in stage.needs:
                first = parts.query(states[:, 0]).unflatten(-1, (-1, 1, parts.head_dim))
            capture.store(first, keys, values, parts.scaling)
            decision = self._decide(stage, hidden_states, hidden_states, capture, carry)
            tokens = self._reduce(hidden_states, decision, carry)
            states = parts.norm(tokens)
        mask = None if bias is None else bias.to(keys.dtype)
        dropout = parts.dropout if self.training else 0.0
        queries = heads(parts.query, states)
        attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=parts.scaling)
        return self.add_attention(tokens, parts.output(attended.transpose(1, 2).flatten(2)))

    def _decide(self, stage: Stage, tokens: Tensor, inputs: Tensor, capture: Capture, carry: Carry | None) -> Decision:
        """What leaves ``tokens`` (B, P + N, D)."""
        state = self.token_prune
        n_keep = num_kept(stage, tokens.shape[1] - state.num_protected)
        sizes = carry.sizes.get(state.layer) if carry is not None else None
        numbers = row_numbers(tokens) if carry is None else carry.row_numbers(tokens)
        # Autocast would take the scores to half precision.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            signals = capture.signals(tokens, inputs, state.num_protected, state.has_cls, sizes, numbers)
            reduction = stage.reduce(signals, n_keep)
        for recorder in tuple(state.recorders):  # another thread may end its recording
            owner = owner_of(reduction, signals.num_prunable)
            recorder.on_reduction(stage.name, reduction.keep, owner, reduction.importance)
        return Decision(reduction, signals.rows)

    def _reduce(self, tokens: Tensor, decision: Decision, carry: Carry | None) -> Tensor:
        """(B, P + N, D) -> (B, P + n, D)."""
        state, reduction = self.token_prune, decision.reduction
        sizes = carry.sizes.get(state.layer) if carry is not None else None
        if carry is not None and state.restore:
            carry.remember(state.layer, reduction, tokens, state.num_protected)
        if isinstance(reduction, Reduction):
            protected, prunable = decision.rows[:, : state.num_protected], decision.rows[:, state.num_protected :]
            rows = torch.cat([protected, reduction.keep + prunable[:, :1]], dim=1)
            reduced, sizes = take_rows(tokens, rows), None if sizes is None else take_rows(sizes, rows)
        else:
            reduced, sizes = merge_tokens(tokens, sizes, reduction)
        if carry is not None and sizes is not None:
            carry.sizes[state.layer + 1] = sizes
        return reduced


def merge_tokens(tokens: Tensor, sizes: Tensor | None, merging: Merging) -> tuple[Tensor, Tensor | None]:
    """States (B, P + n, D) and sizes (B, P + n) of what goes on of ``tokens`` (B, P + N, D).

    Args:
        sizes: (B, P + N) float32; None: one each.
    """
    rows, into = merging.rows, merging.into
    moved = take_rows(tokens, rows)
    if moved.dtype.itemsize < 4:  # sums of many could overflow
        moved = moved.float()
    weights = sizes if merging.weights is None else merging.weights
    if weights is None:
        weights = moved.new_ones(rows.shape, dtype=torch.float32)
    else:
        weights = take_rows(weights, rows)
        moved.mul_(weights.unsqueeze(-1))
    states = merge_rows(moved, into)
    if not merging.average:
        return states.to(tokens.dtype), None
    total = merge_rows(weights, into)
    states.div_(total.unsqueeze(-1))
    if merging.weights is not None:
        total = merge_rows(torch.ones_like(weights) if sizes is None else take_rows(sizes, rows), into)
    return states.to(tokens.dtype), total


def num_kept(stage: Stage, num_prunable: int) -> int:
    """Tokens that ``stage`` leaves, as a number for a compiler too. With ``dynamic=True`` ratios and sizes are symbols
    to it, and counts of one layer after the other are nested floors, which it would simplify for hours."""
    return index(stage.num_kept(num_prunable))


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Masks are as long as the full sequence; one that masks nothing (all that ViTs make) can be left out."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise UnsupportedModelError(
            f"this attention makes masks of another kind ({type(attention_mask).__name__}), as long as the full "
            'sequence; call model.set_attn_implementation("sdpa") for a pruned model'
        )
    message = "a pruned vision model takes no attention_mask; call unprune(model) to use one"
    # A compiler makes one before its values are known. A block in it that runs again for a backward gets that one too.
    if attention_mask.dim() == 4:
        require(attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0, message)
        return
    raise UnsupportedModelError(message)


def require(visible: Tensor, message: str) -> None:
    """Raise UnsupportedModelError with ``message`` unless all of ``visible`` is true; where it runs, if compiled."""
    if torch.compiler.is_compiling():
        torch._assert_async(visible.all(), message)
    elif not bool(visible.all()):
        raise UnsupportedModelError(message)
