"""A regular grid: keep tokens at even distances, whatever the image shows."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..registry import register_method
from ..signals import Reduction, Shape, Signals, Stage
from ..tokens import num_to_keep
from .layerwise import BaselineConfig


@register_method("uniform")
@dataclass(frozen=True)
class UniformConfig(BaselineConfig):
    """Keep evenly spaced tokens (in raster order) at each layer.

    By default 70 % after blocks 2, 5 and 8 of 0 to 11; in a decoder 9.8 %, at once.
    """

    default_blocks: ClassVar[tuple[int, ...]] = (3, 6, 9)
    default_keep_ratios: ClassVar[tuple[float, ...]] = (0.7, 0.7, 0.7)

    def stages_for(self, shape: Shape) -> tuple[Stage, ...]:
        places = self.places(shape)
        return tuple(UniformStage(layer, where, ratio, **shared) for layer, where, ratio, shared in places)


@dataclass(frozen=True)
class UniformStage(Stage):
    keep_ratio: float

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        batch, num_tokens = signals.tokens.shape[:2]
        num_prunable = num_tokens - signals.num_protected
        steps = torch.arange(n_keep, device=signals.tokens.device)
        keep = (steps * num_prunable + num_prunable // 2).div(max(n_keep, 1), rounding_mode="floor")
        return Reduction(keep.expand(batch, -1))
