"""DivPrune: keep the image tokens that are most different from each other; with Cen-Prune's centring, if asked for.

Follows the equations of Saeed Ranjbar Alvar, Gursimran Singh, Mohammad Akbari, Yong Zhang, "DivPrune: Diversity-based
Visual Token Pruning for Large Multimodal Models", CVPR 2025 (arXiv 2503.02175), and of "Cen-Prune" (arXiv 2608.30263).
Written from the papers; the official code of DivPrune has a non-commercial licence and no line of it was used, of
Cen-Prune there was none.

Axes: B batch, N image tokens, D width, k kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..registry import register_method
from ..signals import ENTRANCE, VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from .decoderwise import RatioConfig, RatioStage
from .similarity import NEGLIGIBLE, centred, check_count, cosines, global_consistency, min_max


@register_method("divprune")
@dataclass(frozen=True)
class DivPruneConfig(RatioConfig):
    """DivPrune in front of the decoder. The default is the paper's 56 of 576 tokens, on projected features.

    Args:
        keep_ratio: fraction of the image tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay.
        budget: the ratio holds, and diversity is sought, in every "image" or in all images of a "sample" together.
        centre: Cen-Prune: distances are of centred features, and weighted by how little a token is like all others.
        features: whose distances: of "projected" features at the entrance of the decoder, or of "tower" features, which
            the projector or merger reads, of every encoded image (of every crop, of every frame). Centred tower
            features are standardized too, as Cen-Prune does for Qwen.
    """

    keep_ratio: float = 0.098
    budget: Literal["image", "sample"] = "image"
    centre: bool = False
    features: Literal["projected", "tower"] = "projected"

    @property
    def place(self) -> int:
        return VISION_TOWER if self.features == "tower" else ENTRANCE

    def validate(self) -> None:
        super().validate()
        allowed = "'image': in the vision tower every image is on its own (features='tower')"
        self.check(self.budget == "image" or self.features == "projected", "budget", allowed)

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        where = "vision_tower" if self.features == "tower" else "entrance"
        return (DivPruneStage(-1, where, self.keep_ratio, self.centre, budget=self.budget, **self.shared(shape)),)


@dataclass(frozen=True)
class DivPruneStage(RatioStage):
    centre: bool

    @property
    def in_tower(self) -> bool:
        return self.where == "vision_tower"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_features"} if self.in_tower else ())

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        features = signals.need("tower_features") if self.in_tower else signals.tokens[:, signals.num_protected :]
        weight = None
        if self.centre:
            features, weight = (standardized_view if self.in_tower else centred_view)(features)
        return Reduction(divprune(features, n_keep, weight).sort(dim=1).values)


def divprune(features: Tensor, n_keep: int, weight: Tensor | None = None) -> Tensor:
    """Greedy answer to the max-min diversity problem (Algorithm 1): the smallest distance within the kept set is large.

    The distance of two tokens is 1 − cosine (eq. 4). The first token is the one whose nearest neighbour is farthest;
    each next one is the token farthest from all chosen so far, measured by the nearest of them.

    Args:
        features: (B, N, D); scores are float32 whatever its dtype. A zero vector has distance 1 to every token.
        n_keep: 1 <= k <= N.
        weight: (B, N) that the distance of a token is multiplied with, but for the first choice.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    batch, num_tokens, _ = features.shape
    check_count(n_keep, num_tokens)
    similarity = cosines(features)
    itself = similarity.diagonal(dim1=1, dim2=2)
    itself.fill_(-math.inf)  # a token is not its own neighbour
    token = similarity.amax(1).argmin(1)
    itself.fill_(1)
    rows = torch.arange(batch, device=features.device)
    nearest = similarity[rows, token]  # of every token among the chosen ones, as similarity
    chosen = [token]
    taken = torch.zeros_like(nearest)  # inf for a chosen one
    for _ in range(n_keep - 1):
        taken.scatter_(1, token.unsqueeze(1), math.inf)
        token = ((nearest if weight is None else weight * (nearest - 1)) + taken).argmin(1)
        chosen.append(token)
        nearest = torch.maximum(nearest, similarity[rows, token])
    return torch.stack(chosen, dim=1)


def centred_view(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, N, D) as Cen-Prune compares them, and the weights (B, N) of their distances.

    What all tokens of an image have in common hides their differences, so it is subtracted. Instead, a token weighs the
    more, the less it is like all others before that: minus its mean cosine with them, brought to [0, 1].
    """
    return centred(features), min_max(global_consistency(features))


def standardized_view(features: Tensor) -> tuple[Tensor, Tensor]:
    """The same of features of which few dimensions hold nearly all variance, as in front of Qwen's merger.

    Each dimension is divided by its standard deviation within the image (one without any is left out), and weights are
    the sigmoid of the z-score.
    """
    features = features.float()
    offset = features - features.mean(1, keepdim=True)
    deviation = offset.square().mean(1, keepdim=True).sqrt()
    varies = deviation > NEGLIGIBLE * features.abs().amax(1, keepdim=True)
    scale = torch.where(varies, 1 / deviation, 0.0)
    consistency = global_consistency(features * scale)
    spread, mean = torch.std_mean(consistency, dim=1, correction=0, keepdim=True)
    return offset * scale, torch.sigmoid((consistency - mean) / (spread + NEGLIGIBLE))
