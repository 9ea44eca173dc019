"""CLS attention: keep the patches that the CLS token of the vision tower attends to most.

The ranking of Qizhe Zhang, Aosong Cheng, Ming Lu, Zhiyong Zhuo, Minqi Wang, Jiajun Cao, Shaobo Guo, Qi She, Shanghang
Zhang, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster" (FasterVLM,
arXiv 2412.01818).

Axes: B images, H heads, T tokens of the tower, N of them patches.
"""

from dataclasses import dataclass

from ..errors import ConfigError
from ..registry import register_method
from ..signals import VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from ..tokens import top_tokens
from .decoderwise import RatioConfig, RatioStage


@register_method("cls_attention")
@dataclass(frozen=True)
class ClsAttentionConfig(RatioConfig):
    """FasterVLM's choice, at the output of the vision tower. The default keeps 64 of 576 patches.

    Args:
        keep_ratio: fraction of the patches of every encoded image (of every crop) kept, in (0, 1];
            ``max(1, round(keep_ratio · N))`` stay.
    """

    @property
    def place(self) -> int:
        return VISION_TOWER

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        if not shape.tower.has_cls:
            raise ConfigError(
                "cls_attention ranks patches by the attention of the CLS token, and the vision tower of this model has "
                "none; use visionzip or divprune"
            )
        return (ClsAttentionStage(-1, "vision_tower", self.keep_ratio, budget="image", **self.shared(shape)),)


@dataclass(frozen=True)
class ClsAttentionStage(RatioStage):
    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attention"})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        importance = signals.need("cls_attention")[..., signals.num_protected :].mean(1)
        return Reduction(top_tokens(importance, n_keep), importance=importance)
