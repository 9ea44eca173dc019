"""CDPruner: keep the image tokens that are different from each other and relevant to the question, as a DPP has it.

Follows the equations of Qizhe Zhang, Mengzhen Liu, Lichen Li, Ming Lu, Yuan Zhang, Junwen Pan, Qi She, Shanghang Zhang,
"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025 (arXiv
2506.10967), with relevance from the language model's embeddings instead of CLIP's.

Axes: B batch, N image tokens, D width, R rows of text, k kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows
from .decoderwise import RatioConfig, RatioStage
from .similarity import centred, check_count, cosines, global_consistency, min_max, unit

EXHAUSTED = 1e-5
"""Of a token's own weight: less than this that is left of it behind the chosen tokens is rounding."""


@register_method("cdpruner")
@dataclass(frozen=True)
class CDPrunerConfig(RatioConfig):
    """CDPruner at the entrance of the decoder. The default is the paper's 64 of 576 tokens.

    Args:
        keep_ratio: fraction of the image tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay.
        relevance: of a token to the "text", from the embeddings of both; or "none": diversity alone.
        theta: how much relevance counts, in (0, 1]: a token weighs exp(theta / (2 (1 − theta)) · relevance), and at 1
            its relevance itself, the paper's rule.
        centre: Cen-Prune: similarity is of centred features, and weights are multiplied with how little a token is like
            all others.
        text: which text: the "question" behind the last image, or "all" text of the prompt.
        budget: the ratio holds, and diversity is sought, in every "image" or in all images of a "sample" together.
    """

    relevance: Literal["text", "none"] = "text"
    theta: float = 0.5
    centre: bool = False
    text: Literal["question", "all"] = "question"
    budget: Literal["image", "sample"] = "image"

    def validate(self) -> None:
        super().validate()
        self.check(0 < self.theta <= 1, "theta", "0 < theta <= 1 (for diversity alone, relevance='none')")
        for name, usual in (("theta", 0.5), ("text", "question")):
            allowed = f"{usual!r}: it has no effect with relevance='none'"
            self.check(self.relevance != "none" or getattr(self, name) == usual, name, allowed)

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        text = self.text if self.relevance == "text" else None
        shared = {"budget": self.budget, **self.shared(shape)}
        return (CDPrunerStage(-1, "entrance", self.keep_ratio, text, self.theta, self.centre, **shared),)


@dataclass(frozen=True)
class CDPrunerStage(RatioStage):
    """``text``: None where relevance does not count."""

    text: Literal["question", "all"] | None
    theta: float
    centre: bool

    @property
    def text_rows(self) -> TextRows | None:
        return None if self.text is None else TextRows(self.text)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.text is None else frozenset({"text"})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        features = signals.tokens[:, signals.num_protected :]
        relevance = None
        if self.text is not None:
            relevance = relevance_to(signals.need("text"), signals.need("text_mask"), features)
        return Reduction(cdpruner(features, n_keep, relevance, self.theta, self.centre).sort(dim=1).values)


def relevance_to(text: Tensor, text_mask: Tensor, features: Tensor) -> Tensor:
    """(B, N) float32: minus the mean cosine of each token of (B, N, D) with the text (B, R, D) under its mask (B, R).

    Minus as in the paper and in the program that takes these embeddings. 0 throughout where there is no text.
    """
    rows = unit(text).masked_fill(~text_mask.unsqueeze(-1), 0.0)
    mean = rows.sum(1, keepdim=True) / text_mask.sum(1).clamp_min(1).view(-1, 1, 1)
    return -(unit(features) * mean).sum(-1)


def cdpruner(
    features: Tensor, n_keep: int, relevance: Tensor | None = None, theta: float = 0.5, centre: bool = False
) -> Tensor:
    """Greedy MAP of the DPP with kernel diag(w) S diag(w): each step takes what enlarges the determinant most.

    S has the cosines of the tokens, w grows with the relevance. Where no token is left that is none of the chosen ones'
    combinations, the kernel says no more, and the others follow as in DivPrune: the least similar to any chosen one.

    Args:
        features: (B, N, D); scores are float32 whatever its dtype.
        n_keep: 1 <= k <= N.
        relevance: (B, N), brought to [0, 1] in each row; one that is constant has no say. None: w is 1.
        theta: in [0, 1]: w = exp(theta / (2 (1 − theta)) · relevance); at 1 the relevance itself.
        centre: S of centred features, and w multiplied with the global consistency in [0, 1] of those before.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    check_count(n_keep, features.shape[1])
    weight = features.new_ones(features.shape[:2], dtype=torch.float32)
    if relevance is not None:
        relevance = min_max(relevance.float())
        # Relative to the greatest weight: of large ones float32 has no square.
        weight = relevance if theta == 1 else torch.exp(theta / (2 * (1 - theta)) * (relevance - 1))
    if centre:
        weight = weight * min_max(global_consistency(features))
        features = centred(features)
    return most_diverse(cosines(features), weight, n_keep)


def most_diverse(similarity: Tensor, weight: Tensor, n_keep: int) -> Tensor:
    """The greedy choice of ``cdpruner``, of cosines (B, N, N) and weights (B, N), as (B, k) in its order.

    A row of the Cholesky factor of the chosen tokens' kernel is added at each step, so that what a token would multiply
    the determinant with is at hand.
    """
    batch, num_tokens, _ = similarity.shape
    rows = torch.arange(batch, device=similarity.device)
    # The diagonal without the rounding of cosines, so that equal weights tie; 0 for a zero vector.
    whole = weight.square() * similarity.diagonal(dim1=1, dim2=2).round()
    left = whole  # of each token behind the chosen ones
    factor = weight.new_zeros(batch, n_keep, num_tokens)
    nearest = torch.full_like(weight, -1.0)  # of every token among the chosen ones, as similarity
    open_ = torch.zeros_like(weight)  # −inf for a chosen one
    chosen: list[Tensor] = []
    for step in range(n_keep):
        counts = left > EXHAUSTED * whole
        token = (torch.where(counts, left, -2 - nearest) + open_).argmax(1)
        chosen.append(token)
        open_.scatter_(1, token.unsqueeze(1), -math.inf)
        nearest = torch.maximum(nearest, similarity[rows, token])
        before, pivot = factor[:, :step], token.view(-1, 1, 1)
        kernel = weight * weight.gather(1, pivot[..., 0]) * similarity[rows, token]
        beyond = kernel - (before.gather(2, pivot.expand(-1, step, 1)) * before).sum(1)
        scale = torch.where(counts, left, math.inf).gather(1, pivot[..., 0]).rsqrt()  # 0 once nothing is left of it
        factor[:, step] = beyond * scale
        left = left - factor[:, step].square()
    return torch.stack(chosen, dim=1)
