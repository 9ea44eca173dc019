"""ATS: keep the tokens that contribute most to what the CLS token gathers.

Follows Mohsen Fayyaz, Soroush Abbasi Koohpayegani, Farnoush Rezaei Jafari, Sunando Sengupta, Hamid Reza Vaezi Joze,
Eric Sommerlade, Hamed Pirsiavash, Jürgen Gall, "Adaptive Token Sampling For Efficient Vision Transformers", ECCV 2022
(arXiv 2111.15667), with a fixed number of tokens.

Axes: B batch, H heads, T all tokens, N prunable tokens, d head width, n kept.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import ModelShape, Reduction, Signals, Stage
from ..tokens import num_to_keep, top_tokens
from .layerwise import LayerwiseConfig
from .visionwise import significance

Sampling = Literal["top_k", "inverse_transform"]


@register_method("ats")
@dataclass(frozen=True)
class ATSConfig(LayerwiseConfig):
    """ATS with a fixed number of tokens. By default 70 % stay after blocks 2, 5 and 8 of 0 to 11.

    Args:
        sampling: "top_k": the tokens of greatest significance. "inverse_transform": the paper's sampling at even
            distances of the cumulative significance; where it hits a token more than once, the most significant of the
            others fill up.
    """

    sampling: Sampling = "top_k"

    default_blocks: ClassVar[tuple[int, ...]] = (3, 6, 9)
    default_keep_ratios: ClassVar[tuple[float, ...]] = (0.7, 0.7, 0.7)

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        return tuple(ATSStage(layer, self.where, ratio, self.sampling) for layer, ratio in self.plan(shape))


@dataclass(frozen=True)
class ATSStage(Stage):
    keep_ratio: float
    sampling: Sampling

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attention", "values"})

    @property
    def reads_tokens(self) -> bool:
        return False

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        scores = significance(signals)
        if self.sampling == "inverse_transform":
            scores = scores / scores.sum(1, keepdim=True).clamp_min(1e-12)
            scores = scores + 2 * sampled(scores, n_keep)  # those that were hit come before all others
        return Reduction(top_tokens(scores, n_keep), importance=scores)


def sampled(scores: Tensor, count: int) -> Tensor:
    """(B, N) 1 where the inverse of the cumulative ``scores`` (B, N) hits at 1/2k, 3/2k, ..., (2k − 1)/2k, else 0."""
    # How many of the k lie at or before the end of each token: it is hit where there are more than before it.
    # Not searchsorted, which ONNX does not have.
    up_to = (scores.cumsum(1) * count + 0.5).floor()
    return (up_to > F.pad(up_to[:, :-1], (1, 0))).to(scores.dtype)
