"""What records are told of a decoder's image tokens, by their numbers among those of their sample.

Axes: B batch, L tokens of a view, M image tokens that came in, N image tokens of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...signals import Merging, Reduction


def tell_kept(recorders: Iterable[Any], name: str, rank: Tensor, is_image: Tensor, most: int) -> None:
    """Which image tokens are left: (B, most) int64, ascending, -1 behind the last one of a sample.

    Args:
        rank: (B, L) int64, of each image token its number; ``is_image`` (B, L) bool: which tokens are one.
    """
    last = torch.iinfo(rank.dtype).max
    kept = rank.masked_fill(~is_image, last).sort(dim=1).values[:, :most]
    for recorder in recorders:
        recorder.on_kept(name, torch.where(kept == last, -1, kept))


def tell_importance(
    recorders: Iterable[Any], name: str, rank: Tensor, ranked: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """How important a stage found each image token: (B, M) float32, NaN where it was not asked.

    Args:
        rank: (B, L) int64, of each image token its number.
        ranked: samples (g, 1), places (g, N) among the L, importance (g, N).
    """
    found = torch.full((len(rank), int(rank.max()) + 1), torch.nan, device=rank.device)
    for rows, index, importance in ranked:
        found[rows, rank[rows, index]] = importance.float()
    for recorder in recorders:
        recorder.on_importance(name, found)


def tell_reduction(recorder: Any, name: str, reduction: Reduction | Merging) -> None:
    """What a stage found of the tokens of each image, of which ``reduction`` (I, ...) chooses."""
    if reduction.importance is not None:
        recorder.on_importance(name, reduction.importance)
    if reduction.tokens is not None:
        recorder.on_average(name)
