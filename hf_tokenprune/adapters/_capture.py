"""Reading the attention of the layers that score tokens, and of no others.

One function is registered with Transformers' ``AttentionInterface``; only the attention modules of scoring layers get a
shadow copy of their config that names it. All other layers keep SDPA or FlashAttention.
"""

import copy
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from ..signals import Signals
from ..tokens import is_exporting

CAPTURE_NAME = "hf_tokenprune_capture"
CAPTURE_ARGUMENT = "token_prune_capture"
CACHE_BYTES = 2 << 20
"""Probabilities of this size are written and read again within a CPU's cache; a whole batch of them is not."""
DEVICE_BYTES = 256 << 20
"""The same elsewhere, where fewer and larger pieces are faster: what they may take of the memory at a time."""


class Capture:
    """Carries signals from the attention of one block to whoever reduces its tokens, for one forward.

    It travels as a keyword argument, or in ``CURRENT``, so no state outlives the forward or is shared between threads.
    """

    def __init__(self, needs: frozenset[str], bias: Tensor | None = None) -> None:
        self.needs = needs
        self.bias = bias  # (B, 1, 1, T) float32, added to the logits of every row
        self.found: list[dict[str, Tensor]] = []  # by call: a tower that packs its images attends to them one by one
        self.attention: list[Tensor] = []  # consecutive pieces of the batch

    def store(
        self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, needs: frozenset[str] | None = None
    ) -> None:
        """Take what is needed of (B, H, T, d) tensors; of the queries token 0 is enough for "cls_attention".

        ``needs``: what of this block, where others give the rest; None: everything.
        """
        needs = self.needs if needs is None else needs
        available = {"queries": queries, "keys": keys, "values": values}
        found = {name: tensor.detach() for name, tensor in available.items() if name in needs}
        with torch.autocast(queries.device.type, enabled=False):
            if "cls_attention" in needs:
                found["cls_attention"] = first_row(queries.detach(), keys.detach(), scaling, self.bias)
            for name in needs & {"received_attention", "earlier_attention"}:
                found[name] = received_attention(queries.detach(), keys.detach(), scaling, self.bias)
        self.found.append(found)

    def signals(
        self,
        tokens: Tensor,
        inputs: Tensor,
        num_protected: int,
        has_cls: bool,
        sizes: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> Signals:
        """What was captured, with the states (B, T, D) that entered the block and those that are to be pruned.

        All on the device of ``tokens``: a tower's features may be those of another block than the one that scores.
        """
        attention = tuple(piece.to(tokens.device) for piece in self.attention) or None
        last = self.found[-1] if self.found else {}
        found: dict[str, Any] = {name: tensor.to(tokens.device) for name, tensor in last.items()}
        return Signals(tokens, inputs, num_protected, has_cls, attention, sizes=sizes, numbers=numbers, **found)


CURRENT: ContextVar[Capture | None] = ContextVar("hf_tokenprune_capture", default=None)
"""What the vision tower that runs now captures, where blocks do not hand keyword arguments on to their attention."""


def first_row(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The attention of token 0: (B, H, T, d) -> (B, H, T) float32. ``bias``: (B, 1, 1, T)."""
    # The query of a head with zeros in the place of the others, so that keys of all heads, which lie side by side, are
    # not copied head by head.
    by_head = torch.diag_embed(queries[:, :, 0].float().mT, dim1=1, dim2=2).flatten(2)  # (B, H, H · d)
    beta, start = (0, by_head[:, :1, :1]) if bias is None else (1, bias.squeeze(1))
    side_by_side = keys.float().transpose(1, 2).flatten(2)
    return torch.baddbmm(start, by_head, side_by_side.mT, beta=beta, alpha=scaling).softmax(-1)


def received_attention(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The share of each token in the attention of all, mean over queries: (B, H, T, d) -> (B, H, T) float32.

    In pieces: the probabilities of an image of 4096 patches would take a gigabyte. ``bias`` (B, 1, 1, T) hides padding,
    whose queries do not count.
    """
    batch, heads, length, _ = queries.shape
    limit = CACHE_BYTES if queries.device.type == "cpu" else DEVICE_BYTES
    maps, rows = max(1, limit // (4 * length**2)), max(1, limit // (4 * length))
    added = queries.new_zeros(1, dtype=torch.float32) if bias is None else bias
    pieces = (x.flatten(0, 1).split(maps) for x in (queries, keys, added.expand(batch, heads, 1, length)))
    received = []
    for q, k, shift in zip(*pieces, strict=True):
        transposed, counts = k.float().mT, (shift == 0).float()  # (m, 1, T) of queries
        total = torch.zeros_like(counts)
        for some, weights in zip(q.split(rows, 1), counts.split(rows, 2), strict=True):
            logits = (some.float() * scaling) @ transposed
            total += weights @ (logits if bias is None else logits + shift).softmax(-1)
        received.append(total / counts.sum(-1, keepdim=True))
    return torch.cat(received).view(batch, heads, length)


def enable_capture(attention: nn.Module, needs: frozenset[str] | None = None) -> None:
    """Route this attention module through ``capture_attention_forward``.

    ``needs``: of a vision tower, what goes to the capture in ``CURRENT``; None: it comes as an argument.
    """
    original: Any = attention.config
    shadow = copy.copy(original)
    shadow.token_prune_original = original
    shadow.token_prune_needs = needs
    shadow._attn_implementation_internal = CAPTURE_NAME
    attention.config = shadow


def is_captured(attention: nn.Module) -> bool:
    """Whether ``enable_capture`` has changed this module; a second method must not read through the first."""
    return hasattr(getattr(attention, "config", None), "token_prune_original")


def disable_capture(attention: nn.Module) -> None:
    """Give the module the very config object back that it had."""
    attention.config = getattr(attention.config, "token_prune_original", attention.config)


def capture_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Capture | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, H, T, d) tensors that also fills the ``Capture`` in its keyword arguments, in the place of
    the mask, or in ``CURRENT``.

    With one QKᵀ the probabilities serve the output and the method. They are made in float32 whatever the model's dtype,
    and in pieces of the batch that stay in cache. Where no probabilities are needed the model's own kernel runs.
    """
    capture: Capture | None = kwargs.pop(CAPTURE_ARGUMENT, None)
    if isinstance(attention_mask, Capture):
        capture, attention_mask = attention_mask, None
    config: Any = module.config
    check_all_heads(query, getattr(config, "num_attention_heads", None) or config.num_heads)
    if config.token_prune_needs is not None:
        # None where gradient checkpointing runs a block once more, which must do what it did
        capture = CURRENT.get() or Capture(config.token_prune_needs)
        capture.bias = None if attention_mask is None else as_bias(attention_mask)
    implementation = config.token_prune_original._attn_implementation
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if capture is not None:
        capture.store(query, key, value, scaling, config.token_prune_needs)
        if capture.bias is not None and attention_mask is None:
            attention_mask = capture.bias.to(query.dtype)
    needs = capture.needs if capture is not None and config.token_prune_needs is None else config.token_prune_needs
    if capture is None or "attention" not in needs:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        forward: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        return forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    outputs, maps = [], []
    piece = _piece(query, key)
    heads = query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        whole = piece == query.shape[0]  # not split, which would fix the batch size of an exported graph
        splits = ((x,) if whole else x.split(piece) for x in (query, key, value))
        for i, (q, k, v) in enumerate(zip(*splits, strict=True)):
            flat_q, flat_k, flat_v = (x.contiguous().flatten(0, 1) for x in (q, k, v))  # (b · H, T, d)
            flat_q, flat_k = flat_q.float(), flat_k.float()
            start, beta = flat_q[:1, :1, :1], 0  # ignored
            if capture.bias is not None:
                start, beta = capture.bias[i * piece : i * piece + q.shape[0]].repeat_interleave(heads, 0).squeeze(1), 1
            attention = torch.baddbmm(start, flat_q, flat_k.mT, beta=beta, alpha=scaling).softmax(-1)
            maps.append(attention.detach().unflatten(0, q.shape[:2]))
            weights = F.dropout(attention.to(v.dtype), p=dropout, training=module.training)
            outputs.append(torch.bmm(weights, flat_v).unflatten(0, q.shape[:2]).transpose(1, 2))
    # Only the eager attention returns its weights (for output_attentions); a fused one would not.
    returned = torch.cat(maps).to(query.dtype) if implementation == "eager" else None
    capture.attention += maps
    return outputs[0] if whole else torch.cat(outputs), returned


def check_all_heads(states: Tensor, num_heads: int) -> None:
    """Raise UnsupportedModelError unless (B, h, T, d) are of all heads: ranks must not choose by different ones."""
    if states.shape[1] != num_heads:
        raise UnsupportedModelError(
            f"the attention of the vision encoder gives {states.shape[1]} of {num_heads} heads here (tensor "
            "parallelism), and each process would choose tokens by its own. Leave the encoder out of the tp_plan, "
            "shard it with FSDP2 (fully_shard), or use a method that reads no attention, such as random or divprune"
        )


def as_bias(mask: Any) -> Tensor:
    """What hides padding from every query, (B, T) or (B, 1, T, T), as (B, 1, 1, T) float32 to be added to logits.

    Raises:
        UnsupportedModelError: it is not a tensor.
    """
    if not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"a method that chooses tokens in the vision tower cannot read a {type(mask).__name__} as its mask: load "
            "the model with attn_implementation='sdpa', or use a method that works in the decoder, such as divprune"
        )
    row = mask[:, None, None] if mask.dim() == 2 else mask[:, :, :1]
    if row.is_floating_point():
        return row.float()
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(row.shape, device=row.device).masked_fill(~row.bool(), lowest)


def _piece(query: Tensor, key: Tensor) -> int:
    """Samples of the batch to work on at a time."""
    if query.device.type != "cpu" or is_exporting():
        return query.shape[0]
    return max(1, CACHE_BYTES // (4 * query.shape[1] * query.shape[2] * key.shape[2]))


AttentionInterface.register(CAPTURE_NAME, capture_attention_forward)
