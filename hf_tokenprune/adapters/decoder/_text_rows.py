"""How much a few rows of text attend to every token: the only part of a decoder's attention that methods read.

Recomputed from queries and keys of those rows (R × L instead of L × L), beside whatever kernel the layer itself uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError


def text_attention(
    attention: Any,
    normed: Tensor,
    num_rows: int,
    rotary: tuple[Tensor, Tensor],
    cached: Tensor | None,
    key_valid: Tensor | None,
    query_scale: Tensor | None,
) -> Tensor:
    """Attention (B, H, R, L) float32 of the last ``num_rows`` tokens, the share of each of the L tokens in it.

    Softmax over all keys a row may see: cached ones, and tokens of this forward that are not padding and not behind it.
    Queries and keys are made in the autocast that the layer itself runs in, the rest in float32.
    Of all heads, also where this process works out a part of them only (tensor parallelism).

    Args:
        attention: the attention module whose projections are used.
        normed: (B, L, D) its input.
        rotary: cos and sin, (B or 1, L, d), of these tokens.
        cached: (B, key heads, K, d) keys before these tokens; None: there are none.
        key_valid: (B, K + L) bool, False for padding; None: no padding.
        query_scale: (B, 1, R, 1) by what the attention multiplies queries; None: by nothing.
    """
    cos, sin = (part.expand(normed.shape[0], -1, -1) for part in rotary)
    with _same_randomness(attention, normed.device):
        queries = _heads(attention, "q", normed[:, -num_rows:], cos[:, -num_rows:], sin[:, -num_rows:])
        keys = _heads(attention, "k", normed, cos, sin)
    if query_scale is not None:
        queries = queries * query_scale.to(queries)
    if cached is not None:
        keys = torch.cat([cached.to(keys), keys], dim=2)
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (B, key heads, queries a key head, R, d)
    with torch.autocast(queries.device.type, enabled=False):
        logits = grouped @ keys.float().unsqueeze(2).mT * attention.scaling
    num_keys = keys.shape[2]
    columns = torch.arange(num_keys, device=logits.device)
    visible = columns <= torch.arange(num_keys - num_rows, num_keys, device=logits.device)[:, None]  # (R, keys)
    if key_valid is not None:
        visible = visible & key_valid[:, None, None, None]
    probabilities = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # rows of filling see nothing
    return all_heads(probabilities.flatten(1, 2)[..., num_keys - normed.shape[1] :], attention)


def all_keys(attention: Any, normed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (B, H', L, d) of all key heads for (B, L, D) inputs of the attention, rotated as it does."""
    cos, sin = (part.expand(normed.shape[0], -1, -1) for part in rotary)
    with _same_randomness(attention, normed.device):
        keys = _heads(attention, "k", normed, cos, sin)
    return all_heads(keys, attention, "k")


def _same_randomness(attention: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Within: random numbers that projections draw (LoRA with dropout) are drawn again by the layer itself.

    Gradient checkpointing runs the layer once more without choosing; it must meet the same ones then.
    """
    if not attention.training:
        return nullcontext()
    if device.type in ("cpu", "mps"):  # MPS has no state of random numbers by device
        return torch.random.fork_rng(devices=())
    return torch.random.fork_rng(devices=(device,), device_type=device.type)


def all_heads(of_mine: Tensor, attention: Any, which: str = "q") -> Tensor:
    """(B, h, ...) of the heads of this process as (B, H, ...) of all: ranks must not choose by different heads.

    ``which`` heads: those of queries ("q"), or of keys ("k").

    Raises:
        UnsupportedModelError: nothing tells which processes have the others.
    """
    config = attention.config
    num_heads = config.num_attention_heads if which == "q" else config.num_key_value_heads
    if of_mine.shape[1] == num_heads:
        return of_mine
    weight: Any = getattr(getattr(attention, f"{which}_proj"), "weight", None)  # quantised layers may have none
    if not hasattr(weight, "device_mesh"):
        raise UnsupportedModelError(
            f"{which}_proj gives {of_mine.shape[1]} of {num_heads} heads and its weight is no DTensor: a method "
            "that reads attention cannot tell which processes have the others. Use one that does not, such as divprune"
        )
    from torch.distributed.tensor import DTensor, Replicate, Shard

    batch, _, rows, length = of_mine.shape
    placements = [Shard(1) if placement.is_shard() else Replicate() for placement in weight.placements]
    shape, stride = torch.Size((batch, num_heads, rows, length)), (num_heads * rows * length, rows * length, length, 1)
    mine = of_mine.contiguous()
    split = DTensor.from_local(mine, weight.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return split.full_tensor()


def _heads(attention: Any, which: str, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") of ``normed`` (B, T, D), as (B, heads, T, d), rotated as this attention does."""
    states = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    states = (states if norm is None else norm(states)).transpose(1, 2)
    rotate: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(states[:, :0], states, cos, sin)[1]  # it rotates two at once, here none and these
