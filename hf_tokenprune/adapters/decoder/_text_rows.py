"""How much a few rows of text attend to every token: the only part of a decoder's attention that methods read.

Recomputed from queries and keys of those rows (R × L instead of L × L), beside whatever kernel the layer itself uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from ._cache import extended

if TYPE_CHECKING:
    from ...signals import Stage
    from ._forward import Forward


def text_attention(
    forward: Forward, stage: Stage, block: Any, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, R, L) float32 of the rows that ``stage.text_rows`` names, and which rows are text, (B, R) bool.

    Softmax over all keys a row may see: cached ones, and tokens of this forward that are not padding and not behind it.

    Args:
        block: the decoder layer that the stage comes after.
        inputs, outputs: (B, L, D) states that entered and left it.
    """
    assert stage.text_rows is not None and forward.layout is not None
    view = forward.views[-1]
    own = stage.text_rows.layer == "own"
    layer: Any = block if own else forward.decoder.layers[stage.layer + 1]  # type: ignore[index]
    tails = [max(tail, 1) for tail in forward.layout.tail]
    num_rows = 1 if stage.text_rows.rows == "last" else max(tails)
    is_text = torch.arange(num_rows, 0, -1, device=inputs.device) <= torch.tensor(tails, device=inputs.device)[:, None]

    attention: Any = layer.self_attn
    normed = layer.input_layernorm(inputs if own else outputs)
    assert view.rotary is not None
    cos, sin = (part.expand(normed.shape[0], -1, -1) for part in view.rotary)
    queries = _heads(attention.q_proj(normed[:, -num_rows:]), attention, cos[:, -num_rows:], sin[:, -num_rows:])
    keys = _heads(attention.k_proj(normed), attention, cos, sin)
    held = forward.held[forward.segment(attention.layer_idx)]
    if forward.cache is not None and held:
        cached: Any = forward.cache.layers[attention.layer_idx].keys
        keys = torch.cat([cached[:, :, :held].to(keys), keys], dim=2)

    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (B, key heads, queries a key head, R, d)
    logits = grouped @ keys.float().unsqueeze(2).mT * attention.scaling
    num_keys = keys.shape[2]
    columns = torch.arange(num_keys, device=logits.device)
    visible = columns <= torch.arange(num_keys - num_rows, num_keys, device=logits.device)[:, None]  # (R, keys)
    past = forward.past[forward.segment(attention.layer_idx)].valid
    padding = view.key_valid if own else extended(past, held, view.valid, normed.shape[1], normed)
    if padding is not None:
        visible = visible & padding[:, None, None, None]
    probabilities = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # rows of filling see nothing
    return probabilities.flatten(1, 2)[..., held:], is_text


def _heads(projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, heads · d) as (B, heads, T, d), rotated."""
    states = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)
