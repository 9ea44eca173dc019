"""What methods share that choose by how alike tokens are.

Axes: B batch, N tokens, M rows, D width, k kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TokenPruneError

NEGLIGIBLE = 1e-6
"""Relative differences of float32 scores that may be rounding: what spans less is taken as constant."""

SAME_GAIN = 1e-5
"""Relative differences in what tokens gain that count as a tie."""


def check_count(n_keep: int, num_tokens: int) -> None:
    """Raise TokenPruneError unless ``n_keep`` of ``num_tokens`` can be chosen one after the other."""
    if not 1 <= n_keep <= num_tokens:
        raise TokenPruneError(f"n_keep={n_keep}: expected 1 <= n_keep <= {num_tokens}, the number of tokens")


@torch.no_grad()
def unit(features: Tensor) -> Tensor:
    """(B, N, D) float32 of length 1; a zero vector stays one, so that its cosine with everything is 0."""
    return F.normalize(features.float(), dim=-1)


SHORT = 1e-4
"""Length of vectors whose direction alone counts."""


def shortened(vectors: Tensor) -> Tensor:
    """(..., d) float32 brought to length ``SHORT``; what is shorter, such as a zero vector, stays as it is.

    That is one operation, where ``F.normalize`` takes three; products are to be divided by ``SHORT ** 2``.
    """
    return torch.renorm(vectors.flatten(0, -2), p=2, dim=0, maxnorm=SHORT).view(vectors.shape)


def products(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """``scale`` times the scalar products of (B, n, d) and (B, m, d), as (B, n, m)."""
    ignored = one[:, :1, :1]  # with beta=0
    return torch.baddbmm(ignored, one, other.mT, beta=0, alpha=scale)


def cosines(features: Tensor) -> Tensor:
    """(B, N, N) float32, of each two tokens of (B, N, D)."""
    rows = unit(features)
    return rows @ rows.transpose(1, 2)


def min_max(scores: Tensor) -> Tensor:
    """Each row of (B, N) brought to [0, 1]; 1 throughout where it is constant, so that it has no say as a factor."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return torch.where(high - low > NEGLIGIBLE, (scores - low) / (high - low), 1.0)


def global_consistency(features: Tensor) -> Tensor:
    """(B, N): minus the mean cosine of each token of (B, N, D) with the others (Cen-Prune); 0 of a single one."""
    rows = unit(features)
    others = rows.sum(1, keepdim=True) - rows
    return -(rows * others).sum(-1) / max(rows.shape[1] - 1, 1)


def centred(features: Tensor) -> Tensor:
    """(B, N, D) float32 less their mean over the tokens; exactly 0 where nothing but rounding is left."""
    features = features.float()
    offset = features - features.mean(1, keepdim=True)
    left, before = (states.norm(dim=-1, keepdim=True) for states in (offset, features))
    return torch.where(left > NEGLIGIBLE * before, offset, 0.0)


@torch.no_grad()
def maximize_coverage(similarity: Tensor, n_keep: int, saliency: Tensor | None = None) -> Tensor:
    """Greedy choice of tokens that cover all rows: each row counts by the chosen token that is most similar to it.

    Args:
        similarity: (B, N, M) float32, of each token that may be chosen with each row; what is negative covers nothing.
        n_keep: 1 <= k <= N.
        saliency: (B, N) that the gain of a token is multiplied with; None: pure coverage (facility location), whose
            greedy choice covers at least 1 − 1/e of what any k tokens cover.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    batch, num_tokens, _ = similarity.shape
    check_count(n_keep, num_tokens)
    rows = torch.arange(batch, device=similarity.device)
    added = similarity.relu()  # by each token to the coverage of each row, beyond that of the chosen ones
    open_ = similarity.new_zeros(batch, num_tokens)  # −inf for a chosen one
    chosen: list[Tensor] = []
    for _ in range(n_keep):
        gain = added.sum(2)
        score = (gain if saliency is None else gain * saliency) + open_
        # Two tokens that improve only each other gain the same but for rounding, which must not decide.
        token = (score >= score.amax(1, keepdim=True) * (1 - SAME_GAIN)).to(torch.uint8).argmax(1)
        chosen.append(token)
        open_.scatter_(1, token.unsqueeze(1), -math.inf)
        added.sub_(added[rows, token].unsqueeze(1)).relu_()  # in place: nothing else here is as large
    return torch.stack(chosen, dim=1)
