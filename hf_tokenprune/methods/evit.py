"""EViT: keep the patches that CLS attends to, and fuse the others into one token.

Follows Youwei Liang, Chongjian Ge, Zhan Tong, Yibing Song, Jue Wang, Pengtao Xie, "Not All Patches are What You Need:
Expediting Vision Transformers via Token Reorganizations", ICLR 2022 (arXiv 2202.07800), without its training.

Axes: B batch, H heads, N prunable tokens, k attentive tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config import Where
from ..registry import register_method
from ..signals import Merging, ModelShape, Reduction, Signals, Stage
from ..tokens import stable_order, top_tokens
from .layerwise import LayerwiseConfig
from .merging import everything, in_place


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

    def reduce(self, signals: Signals, n_keep: int) -> Reduction | Merging:
        if n_keep == signals.num_prunable:
            return everything(signals)
        attention = signals.need("cls_attention").mean(1)
        importance = attention[:, signals.num_protected :]
        if not self.fuse:
            return Reduction(top_tokens(importance, n_keep), importance=importance)
        return replace(fused(signals, attention, n_keep - 1), importance=importance)


def fused(signals: Signals, attention: Tensor, n_attentive: int) -> Merging:
    """The k tokens of greatest ``attention`` (B, P + N) as they are, the others summed with it as their weights."""
    attention[:, : signals.num_protected] = math.inf
    order = stable_order(attention, descending=True)
    split = signals.num_protected + n_attentive
    attentive, inattentive = order[:, :split], order[:, split:].sort(dim=1).values
    first, others = inattentive[:, :1], inattentive[:, 1:]
    staying = torch.cat([attentive, first], dim=1).sort(dim=1).values
    weights = attention.scatter(1, attentive, 1.0)
    return in_place(signals, staying, others, first, weights, average=False)
