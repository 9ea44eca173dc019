"""FastV: behind an early decoder layer, keep the image tokens that the last token attends to most.

Follows Liang Chen, Haozhe Zhao, Tianyu Liu, Shuai Bai, Junyang Lin, Chang Zhou, Baobao Chang, "An Image is Worth 1/2
Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models", ECCV 2024 (arXiv
2403.06764).

Axes: B batch, H heads, N image tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows
from ..tokens import top_tokens
from .decoderwise import DecoderConfig, Positions, num_rounded, scaled_ratio


@register_method("fastv")
@dataclass(frozen=True)
class FastVConfig(DecoderConfig):
    """FastV. The defaults are the paper's K = 2, R = 50 %.

    Args:
        layer: 0-based decoder layer whose attention decides and behind which tokens leave; the paper's K − 1.
        keep_ratio: fraction of the image tokens kept, in (0, 1], the paper's 1 − R; ``max(1, round(keep_ratio · N))``
            stay.
    """

    layer: int = 1
    keep_ratio: float = 0.5

    usual_positions: ClassVar[Positions] = "original"
    one_stage: ClassVar[bool] = True

    def validate(self) -> None:
        self.check(self.layer >= 0, "layer", "a layer number >= 0")
        self.check_ratio("keep_ratio")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        self.check_followed("layer", (self.layer,), shape)
        return (FastVStage(self.layer, "after_block", self.keep_ratio, **self.shared(shape)),)

    def scaled(self, strength: float) -> "FastVConfig":
        return dataclasses.replace(self, keep_ratio=scaled_ratio(self.keep_ratio, strength))

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "FastVConfig":
        ((layer, count),) = counts.items()
        return dataclasses.replace(self, layer=layer, keep_ratio=count / self.prunable(shape))


@dataclass(frozen=True)
class FastVStage(Stage):
    keep_ratio: float

    text_rows: ClassVar[TextRows] = TextRows("last", "own")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_attention"})

    def num_kept(self, num_prunable: int) -> int:
        return num_rounded(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        attention = signals.need("text_attention")[:, :, -1].mean(1)
        return Reduction(top_tokens(attention, n_keep), importance=attention)
