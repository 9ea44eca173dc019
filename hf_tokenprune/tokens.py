"""Arithmetic on tokens: how many stay, which score best, and taking them out of a tensor.

Axes: B batch, P protected tokens, N prunable tokens, D width, n kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TokenPruneError


def num_to_keep(num_tokens: int, keep_ratio: float) -> int:
    """``max(1, floor(num_tokens · keep_ratio))``, and 0 of 0. The epsilon keeps 0.7 · 10 at 7."""
    return max(1, math.floor(num_tokens * keep_ratio + 1e-9)) if num_tokens else 0


is_exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)
"""Whether a graph is being exported, of any batch size and for any device (torch 2.6 tells of ONNX alone)."""


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Positions (B, N) int64 that sort each row of ``values`` (B, N); ties: lower position first, on every device.

    Exported graphs have no stable sort, which ONNX has no operator for: there groups of equal values and positions in
    them are sorted once more, as one integer. That is a few operations more, so elsewhere the stable sort stays.
    """
    if not is_exporting():
        return values.argsort(dim=1, descending=descending, stable=True)
    num_tokens = values.shape[1]
    ranked, positions = values.sort(dim=1, descending=descending)
    group = F.pad((ranked[:, 1:] != ranked[:, :-1]).to(torch.int64).cumsum(1), (1, 0))
    return (group * num_tokens + positions).sort(dim=1).values % max(num_tokens, 1)


def top_tokens(importance: Tensor, n_keep: int) -> Tensor:
    """Positions of the ``n_keep`` most important tokens.

    Args:
        importance: ``(B, N)``, higher = keep.
        n_keep: ``0 <= n_keep <= N``.

    Returns:
        ``(B, n_keep)`` int64, ascending. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    if not 0 <= n_keep <= importance.shape[1]:
        raise TokenPruneError(f"n_keep={n_keep}: expected 0 <= n_keep <= {importance.shape[1]}, the number of tokens")
    return stable_order(importance, descending=True)[:, :n_keep].sort(dim=1).values


def row_numbers(tokens: Tensor) -> Tensor:
    """(B · N,) int64: 0, 1, …, which number the rows of ``tokens.flatten(0, 1)`` of (B, N, ...)."""
    return torch.arange(tokens.shape[0] * tokens.shape[1], device=tokens.device)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """``tokens`` (B, N, ...) at ``rows`` (B, n) of ``tokens.flatten(0, 1)``, as (B, n, ...).

    Rows are copied whole, which torch.gather, element by element, does several times slower.
    """
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens`` (B, N, D) at ``index`` (B, n), as (B, n, D)."""
    numbers = row_numbers(tokens).view(tokens.shape[:2])
    return take_rows(tokens, index + numbers[:, :1])


def merge_rows(moved: Tensor, into: Tensor) -> Tensor:
    """Of ``moved`` (B, n + m, ...) the first n, with the last m added to those at the places ``into`` (B, m)."""
    staying = moved.shape[1] - into.shape[1]
    index = into if moved.dim() == 2 else into.unsqueeze(-1).expand(-1, -1, moved.shape[2])
    return moved[:, :staying].scatter_add(1, index, moved[:, staying:])


def with_protected(keep: Tensor, num_protected: int) -> Tensor:
    """Positions in the whole sequence: ``keep`` (B, n) of the prunable tokens behind the protected ones, (B, P + n)."""
    protected = torch.arange(num_protected, device=keep.device).expand(keep.shape[0], -1)
    return torch.cat([protected, keep + num_protected], dim=1)


def position_noise(num_tokens: int, seed: int, device: torch.device) -> Tensor:
    """(1, N) pseudo-random numbers in [0, 1) from integer arithmetic: no generator state, the same on every device."""
    x = (torch.arange(1, num_tokens + 1, device=device) + seed * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the "lowbias32" integer hash
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).float() / 2**32).unsqueeze(0)
