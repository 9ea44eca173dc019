"""PyramidDrop: in a few stages, keep the image tokens that the last token of the instruction is about to attend to.

Follows Long Xing, Qidong Huang, Xiaoyi Dong, Jiajie Lu, Pan Zhang, Yuhang Zang, Yuhang Cao, Conghui He, Jiaqi Wang,
Feng Wu, Dahua Lin, "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025 (arXiv 2410.17247).

Axes: B batch, H heads, N image tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows
from ..tokens import num_to_keep, top_tokens
from .decoderwise import DecoderConfig, scaled_ratio


@register_method("pyramiddrop")
@dataclass(frozen=True)
class PyramidDropConfig(DecoderConfig):
    """PyramidDrop. The default is the paper's: after layers 8, 16 and 24 of 32, one half, quarter, eighth stays.

    Args:
        layers: 0-based decoder layers behind which tokens leave, ascending, one a ratio. None: those that divide the
            depth evenly, three ratios at its quarters.
        keep_ratios: fractions of the original image tokens kept, one a stage, never increasing;
            ``max(1, floor(N · ratio))`` stay.
    """

    layers: tuple[int, ...] | None = None
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    def validate(self) -> None:
        self.check_ratios_of_original("keep_ratios")
        if self.layers is not None:
            self.check_ascending("layers")
            self.check(len(self.layers) == len(self.keep_ratios), "layers", f"one for each of {self.keep_ratios}")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        layers = self.layers or evenly(len(self.keep_ratios), shape.depth)
        self.check_followed("layers", layers, shape)
        ratios = dict(zip(layers, self.keep_ratios, strict=True))  # in a shallow model the last of a layer counts
        shared = self.shared(shape)
        return tuple(PyramidDropStage(layer, "after_block", ratio, **shared) for layer, ratio in ratios.items())

    def scaled(self, strength: float) -> "PyramidDropConfig":
        return dataclasses.replace(self, keep_ratios=tuple(scaled_ratio(r, strength) for r in self.keep_ratios))

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "PyramidDropConfig":
        return dataclasses.replace(self, layers=tuple(counts), keep_ratios=self.ratios_of_original(shape, counts))


@dataclass(frozen=True)
class PyramidDropStage(Stage):
    keep_ratio: float

    counts_from: ClassVar[Literal["entering", "original"]] = "original"
    text_rows: ClassVar[TextRows] = TextRows("last", "next")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_attention"})

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        attention = signals.need("text_attention")[:, :, -1].mean(1)
        return Reduction(top_tokens(attention, n_keep), importance=attention)


def evenly(count: int, depth: int) -> tuple[int, ...]:
    """0-based layers that end the first ``count`` of ``count + 1`` equal parts of a model of ``depth`` layers."""
    ends = [int(depth * part / (count + 1) + 0.5) for part in range(1, count + 1)]
    return tuple(max(min(end, depth - 1), 1) - 1 for end in ends)
