"""How much a few rows of text attend to every token: the only part of a decoder's attention that methods read.

Recomputed from queries and keys of those rows (R × L instead of L × L), beside whatever kernel the layer itself uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def text_attention(
    attention: Any,
    normed: Tensor,
    num_rows: int,
    rotary: tuple[Tensor, Tensor],
    cached: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Attention (B, H, R, L) float32 of the last ``num_rows`` tokens, the share of each of the L tokens in it.

    Softmax over all keys a row may see: cached ones, and tokens of this forward that are not padding and not behind it.

    Args:
        attention: the attention module whose projections are used.
        normed: (B, L, D) its input.
        rotary: cos and sin, (B or 1, L, d), of these tokens.
        cached: (B, key heads, K, d) keys before these tokens; None: there are none.
        key_valid: (B, K + L) bool, False for padding; None: no padding.
    """
    cos, sin = (part.expand(normed.shape[0], -1, -1) for part in rotary)
    queries = _heads(attention.q_proj(normed[:, -num_rows:]), attention, cos[:, -num_rows:], sin[:, -num_rows:])
    keys = _heads(attention.k_proj(normed), attention, cos, sin)
    if cached is not None:
        keys = torch.cat([cached.to(keys), keys], dim=2)
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (B, key heads, queries a key head, R, d)
    logits = grouped @ keys.float().unsqueeze(2).mT * attention.scaling
    num_keys = keys.shape[2]
    columns = torch.arange(num_keys, device=logits.device)
    visible = columns <= torch.arange(num_keys - num_rows, num_keys, device=logits.device)[:, None]  # (R, keys)
    if key_valid is not None:
        visible = visible & key_valid[:, None, None, None]
    probabilities = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # rows of filling see nothing
    return probabilities.flatten(1, 2)[..., num_keys - normed.shape[1] :]


def _heads(projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, heads · d) as (B, heads, T, d), rotated."""
    states = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)
