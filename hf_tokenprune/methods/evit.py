"""EViT: keep the patches that CLS attends to, and fuse the others into one token.

Follows Youwei Liang, Chongjian Ge, Zhan Tong, Yibing Song, Jue Wang, Pengtao Xie, "Not All Patches are What You Need:
Expediting Vision Transformers via Token Reorganizations", ICLR 2022 (arXiv 2202.07800), without its training.

Axes: B batch, H heads, N prunable tokens, k attentive tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..config import Where
from ..registry import register_method
from ..signals import ModelShape, Reduction, Signals, Stage
from ..tokens import top_tokens
from .layerwise import LayerwiseConfig
from .merging import everything, joined


@register_method("evit")
@dataclass(frozen=True)
class EViTConfig(LayerwiseConfig):
    """EViT. By default 70 % stay in blocks 3, 6 and 9 of 0 to 11, and one token more: the fused others.

    Args:
        fuse: the tokens that CLS attends to least become one, their sum weighted with that attention, in the place of
            the first of them. False: they leave.
    """

    where: Where = "mid_block"
    fuse: bool = True

    default_blocks: ClassVar[tuple[int, ...]] = (4, 7, 10)
    default_keep_ratios: ClassVar[tuple[float, ...]] = (0.7, 0.7, 0.7)

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        return tuple(EViTStage(layer, self.where, ratio, self.fuse) for layer, ratio in self.plan(shape))

    def ratio_for(self, entering: int, n_keep: int) -> float:
        return min(max(n_keep - self.fuse, 1), entering) / entering

    def fewest(self, num_tokens: int) -> int:
        return 1 + self.fuse


@dataclass(frozen=True)
class EViTStage(Stage):
    keep_ratio: float
    fuse: bool

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attention"})

    def num_attentive(self, num_prunable: int) -> int:
        """``ceil(num_prunable · keep_ratio)``. The epsilon keeps 0.7 · 10 at 7."""
        return math.ceil(num_prunable * self.keep_ratio - 1e-9)

    def num_kept(self, num_prunable: int) -> int:
        return min(self.num_attentive(num_prunable) + self.fuse, num_prunable)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        attention = signals.need("cls_attention")[:, :, signals.num_protected :].mean(1)
        if n_keep == attention.shape[1]:
            return everything(signals)
        if not self.fuse:
            return Reduction(top_tokens(attention, n_keep), importance=attention)
        return replace(fused(attention, n_keep - 1), importance=attention)


def fused(attention: Tensor, n_attentive: int) -> Reduction:
    """The k tokens of greatest ``attention`` (B, N) as they are, the others summed with their attention as weight."""
    inattentive = top_tokens(-attention, attention.shape[1] - n_attentive)
    weights = attention.scatter(1, top_tokens(attention, n_attentive), 1.0)
    first, others = inattentive[:, :1], inattentive[:, 1:]
    return joined(others, first.expand_as(others), weights)
