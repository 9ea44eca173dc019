"""Reading the attention of the layers that score tokens, and of no others.

One function is registered with Transformers' ``AttentionInterface``; only the attention modules of scoring layers get a
shadow copy of their config that names it. All other layers keep SDPA or FlashAttention.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..signals import Signals
from ..tokens import is_exporting

CAPTURE_NAME = "hf_tokenprune_capture"
CAPTURE_ARGUMENT = "token_prune_capture"
CACHE_BYTES = 2 << 20
"""Probabilities of this size are written and read again within a CPU's cache; a whole batch of them is not."""


class Capture:
    """Carries signals from the attention of one block to the block itself, for one forward.

    It travels as a keyword argument, so no state outlives the forward or is shared between threads.
    """

    def __init__(self, needs: frozenset[str], bias: Tensor | None = None) -> None:
        self.needs = needs
        self.bias = bias  # (B, 1, 1, T) float32, added to the logits of every row
        self.found: dict[str, Tensor] = {}
        self.attention: list[Tensor] = []  # consecutive pieces of the batch

    def store(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        """Take what is needed of (B, H, T, d) tensors; of the queries token 0 is enough for "cls_attention"."""
        available = {"queries": queries, "keys": keys, "values": values}
        self.found = {name: tensor.detach() for name, tensor in available.items() if name in self.needs}
        if "cls_attention" in self.needs:
            with torch.autocast(queries.device.type, enabled=False):
                logits = (queries[:, :, :1].float() @ keys.float().mT) * scaling
                attention = (logits if self.bias is None else logits + self.bias).softmax(-1)
            self.found["cls_attention"] = attention.squeeze(2).detach()

    def signals(
        self, tokens: Tensor, inputs: Tensor, num_protected: int, has_cls: bool, sizes: Tensor | None = None
    ) -> Signals:
        """What was captured, with the states (B, T, D) that entered the block and those that are to be pruned.

        All on the device of ``tokens``: a tower's features may be those of another block than the one that scores.
        """
        attention = tuple(piece.to(tokens.device) for piece in self.attention) or None
        found = {name: tensor.to(tokens.device) for name, tensor in self.found.items()}
        return Signals(tokens, inputs, num_protected, has_cls, attention, sizes=sizes, **found)


def enable_capture(attention: nn.Module) -> None:
    """Route this attention module through :func:`capture_attention_forward`."""
    original: Any = attention.config
    shadow = copy.copy(original)
    shadow.token_prune_original = original
    shadow._attn_implementation_internal = CAPTURE_NAME
    attention.config = shadow


def is_captured(attention: nn.Module) -> bool:
    """Whether :func:`enable_capture` has changed this module; a second method must not read through the first."""
    return hasattr(attention.config, "token_prune_original")


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
    """Attention of (B, H, T, d) tensors that also fills the :class:`Capture` in its keyword arguments, or in the place
    of the mask.

    With one QKᵀ the probabilities serve the output and the method. They are made in float32 whatever the model's dtype,
    and in pieces of the batch that stay in cache. Where no probabilities are needed the model's own kernel runs.
    """
    capture: Capture | None = kwargs.pop(CAPTURE_ARGUMENT, None)
    if isinstance(attention_mask, Capture):
        capture, attention_mask = attention_mask, None
    config: Any = module.config
    implementation = config.token_prune_original._attn_implementation
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if capture is not None:
        capture.store(query, key, value, scaling)
        if capture.bias is not None:
            attention_mask = capture.bias.to(query.dtype)
    if capture is None or "attention" not in capture.needs:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        forward: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        return forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    outputs = []
    piece = _piece(query, key)
    heads = query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        whole = piece == query.shape[0]  # not split, which would fix the batch size of an exported graph
        splits = ((x,) if whole else x.split(piece) for x in (query, key, value))
        for i, (q, k, v) in enumerate(zip(*splits, strict=True)):
            flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))  # (b · H, T, d)
            start, beta = query.new_zeros((), dtype=torch.float32), 0
            if capture.bias is not None:
                start, beta = capture.bias[i * piece : i * piece + q.shape[0]].repeat_interleave(heads, 0).squeeze(1), 1
            logits = torch.baddbmm(start, flat_q.float(), flat_k.float().mT, beta=beta, alpha=scaling)
            attention = logits.softmax(-1)
            capture.attention.append(attention.detach().unflatten(0, q.shape[:2]))
            weights = F.dropout(attention.to(v.dtype), p=dropout, training=module.training)
            outputs.append((weights @ flat_v).unflatten(0, q.shape[:2]).transpose(1, 2))
    # Only the eager attention returns its weights (for output_attentions); a fused one would not.
    returned = torch.cat(capture.attention).to(query.dtype) if implementation == "eager" else None
    return torch.cat(outputs), returned


def _piece(query: Tensor, key: Tensor) -> int:
    """Samples of the batch to work on at a time."""
    if query.device.type != "cpu" or is_exporting():
        return query.shape[0]
    return max(1, CACHE_BYTES // (4 * query.shape[1] * query.shape[2] * key.shape[2]))


AttentionInterface.register(CAPTURE_NAME, capture_attention_forward)
