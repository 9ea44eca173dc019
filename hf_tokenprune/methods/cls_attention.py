"""CLS attention: keep the patches that the CLS token of the vision tower attends to most.

The ranking of Qizhe Zhang, Aosong Cheng, Ming Lu, Zhiyong Zhuo, Minqi Wang, Jiajun Cao, Shaobo Guo, Qi She, Shanghang
Zhang, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster" (FasterVLM,
arXiv 2412.01818).

Axes: B images, H heads, T tokens of the tower, N of them patches.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..registry import register_method
from ..signals import VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from ..tokens import top_tokens
from .decoderwise import DecoderConfig, num_rounded
from .layerwise import scaled_ratio


@register_method("cls_attention")
@dataclass(frozen=True)
class ClsAttentionConfig(DecoderConfig):
    """FasterVLM's choice, at the output of the vision tower. The default keeps 64 of 576 patches.

    Args:
        keep_ratio: fraction of the patches of every encoded image (of every crop) kept, in (0, 1];
            ``max(1, round(keep_ratio · N))`` stay.
    """

    keep_ratio: float = 1 / 9

    one_stage: ClassVar[bool] = True

    def validate(self) -> None:
        self.check_ratio("keep_ratio")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        if not shape.tower.has_cls:
            raise ConfigError(
                "cls_attention ranks patches by the attention of the CLS token, and the vision tower of this model has "
                "none; use visionzip or divprune"
            )
        return (ClsAttentionStage(-1, "vision_tower", self.keep_ratio, budget="image", **self.shared(shape)),)

    def scaled(self, strength: float) -> "ClsAttentionConfig":
        return dataclasses.replace(self, keep_ratio=scaled_ratio(self.keep_ratio, strength))

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        return (VISION_TOWER,)

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "ClsAttentionConfig":
        tokens = shape.tower_tokens
        kept = min(counts[VISION_TOWER] // shape.tower_images, tokens)
        return dataclasses.replace(self, keep_ratio=kept / tokens)


@dataclass(frozen=True)
class ClsAttentionStage(Stage):
    keep_ratio: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attention"})

    def num_kept(self, num_prunable: int) -> int:
        return num_rounded(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        importance = signals.need("cls_attention")[..., signals.num_protected :].mean(1)
        return Reduction(top_tokens(importance, n_keep))
