"""DivPrune: keep the image tokens that are most different from each other.

Follows the equations of Saeed Ranjbar Alvar, Gursimran Singh, Mohammad Akbari, Yong Zhang, "DivPrune: Diversity-based
Visual Token Pruning for Large Multimodal Models", CVPR 2025 (arXiv 2503.02175). Written from the paper; the official
code has a non-commercial licence and no line of it was used.

Axes: B batch, N image tokens, D width, k kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TokenPruneError
from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage
from .decoderwise import RatioConfig, RatioStage


@register_method("divprune")
@dataclass(frozen=True)
class DivPruneConfig(RatioConfig):
    """DivPrune at the entrance of the decoder, on projected features. The default is the paper's 56 of 576 tokens.

    Args:
        keep_ratio: fraction of the image tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay.
        budget: the ratio holds, and diversity is sought, in every "image" or in all images of a "sample" together.
    """

    keep_ratio: float = 0.098
    budget: Literal["image", "sample"] = "image"

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        return (DivPruneStage(-1, "entrance", self.keep_ratio, budget=self.budget, **self.shared(shape)),)


@dataclass(frozen=True)
class DivPruneStage(RatioStage):
    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        return Reduction(divprune(signals.tokens[:, signals.num_protected :], n_keep).sort(dim=1).values)


def divprune(features: Tensor, n_keep: int) -> Tensor:
    """Greedy answer to the max-min diversity problem (Algorithm 1): the smallest distance within the kept set is large.

    The distance of two tokens is 1 − cosine (eq. 4). The first token is the one whose nearest neighbour is farthest;
    each next one is the token farthest from all chosen so far, measured by the nearest of them.

    Args:
        features: (B, N, D); scores are float32 whatever its dtype. A zero vector has distance 1 to every token.
        n_keep: 1 <= k <= N.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    batch, num_tokens, _ = features.shape
    if not 1 <= n_keep <= num_tokens:
        raise TokenPruneError(f"n_keep={n_keep}: expected 1 <= n_keep <= {num_tokens}, the number of tokens")
    unit = F.normalize(features.float(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    itself = similarity.diagonal(dim1=1, dim2=2)
    itself.fill_(-math.inf)  # a token is not its own neighbour
    token = similarity.amax(1).argmin(1)
    itself.fill_(math.inf)  # and a chosen one is never far enough to be chosen again
    rows = torch.arange(batch, device=features.device)
    nearest = similarity[rows, token]  # of every token among the chosen ones, as similarity
    chosen = [token]
    for _ in range(n_keep - 1):
        token = nearest.argmin(1)
        chosen.append(token)
        nearest = torch.maximum(nearest, similarity[rows, token])
    return torch.stack(chosen, dim=1)
