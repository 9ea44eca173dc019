"""SCOPE: keep the patches that cover the image, those first that draw attention.

Follows the equations of Jinhong Deng, Wen Li, Joey Tianyi Zhou, Yang He, "SCOPE: Saliency-Coverage Oriented Token
Pruning for Efficient Multimodel LLMs", NeurIPS 2025 (arXiv 2510.24214). The official code has no licence and no line of
it was used.

Axes: B batch, H heads, N tokens, D width, k kept.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..registry import register_method
from ..signals import ENTRANCE, VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from .decoderwise import RatioConfig, RatioStage
from .similarity import cosines, maximize_coverage


@register_method("scope")
@dataclass(frozen=True)
class ScopeConfig(RatioConfig):
    """SCOPE, at the output of the vision tower. The default is the paper's 64 of 576 patches.

    Args:
        keep_ratio: fraction of the tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay: of every encoded
            image (of every crop), or with ``saliency="none"`` of every image.
        saliency: "attention" that a patch draws in the vision tower, from CLS or, without one, from all; or "none":
            coverage alone, of projected features at the entrance of the decoder.
        alpha: exponent of the saliency; the larger, the less coverage counts.
    """

    saliency: Literal["attention", "none"] = "attention"
    alpha: float = 1.0

    @property
    def place(self) -> int:
        return VISION_TOWER if self.saliency == "attention" else ENTRANCE

    def validate(self) -> None:
        super().validate()
        self.check(self.alpha > 0, "alpha", "alpha > 0 (for coverage alone, saliency='none')")
        allowed = "1.0: it has no effect with saliency='none'"
        self.check(self.alpha == 1 or self.saliency != "none", "alpha", allowed)

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        if self.saliency == "none":
            where, attention = "entrance", None
        else:
            where, attention = "vision_tower", "cls_attention" if shape.tower.has_cls else "received_attention"
        stage = ScopeStage(-1, where, self.keep_ratio, attention, self.alpha, budget="image", **self.shared(shape))
        return (stage,)


@dataclass(frozen=True)
class ScopeStage(RatioStage):
    """``attention``: name of the signal that saliency comes from; None: there is no saliency."""

    attention: str | None
    alpha: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.attention is None else frozenset({self.attention})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        features = signals.tokens[:, signals.num_protected :]
        saliency = None
        if self.attention is not None:
            saliency = signals.need(self.attention)[..., signals.num_protected :].sum(1)
        return Reduction(scope(features, n_keep, saliency, self.alpha).sort(dim=1).values)


def scope(features: Tensor, n_keep: int, saliency: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Greedy choice by coverage gained times saliency: a token is covered by its greatest cosine with a chosen one.

    Args:
        features: (B, N, D); scores are float32 whatever its dtype. A zero vector covers nothing.
        n_keep: 1 <= k <= N.
        saliency: (B, N), not negative; tokens of none are chosen last, by coverage. None: coverage alone.
        alpha: its exponent.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    factor = None
    if saliency is not None:  # of the greatest, so that no power of it leaves float32
        saliency = saliency.float().clamp_min(1e-12)
        factor = (saliency / saliency.amax(1, keepdim=True)).pow(alpha).clamp_min(1e-30)
    return maximize_coverage(cosines(features), n_keep, factor)
