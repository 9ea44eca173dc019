"""Random dropping: the floor that every method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from ..registry import register_method
from ..signals import Reduction, Shape, Signals, Stage
from ..tokens import num_to_keep, position_noise, top_tokens
from .layerwise import BaselineConfig


@register_method("random")
@dataclass(frozen=True)
class RandomConfig(BaselineConfig):
    """Keep a random subset at each layer. By default 70 % after blocks 2, 5, 8 of 0 to 11; in a decoder 9.8 %, at once.

    The subset depends on ``seed``, the layer and the number of tokens, not on the image or its place in the batch, so
    that runs repeat and a batch equals its samples alone. Average over seeds for a figure.
    """

    seed: int = 0

    default_blocks: ClassVar[tuple[int, ...]] = (3, 6, 9)
    default_keep_ratios: ClassVar[tuple[float, ...]] = (0.7, 0.7, 0.7)

    def validate(self) -> None:
        super().validate()
        self.check(0 <= self.seed < 2**31, "seed", "0 <= seed < 2**31")

    def stages_for(self, shape: Shape) -> tuple[Stage, ...]:
        places = self.places(shape)
        return tuple(RandomStage(layer, where, ratio, self.seed, **shared) for layer, where, ratio, shared in places)


@dataclass(frozen=True)
class RandomStage(Stage):
    keep_ratio: float
    seed: int

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        batch, num_tokens = signals.tokens.shape[:2]
        scores = position_noise(
            num_tokens - signals.num_protected, self.seed + 7919 * self.layer, signals.tokens.device
        )
        return Reduction(top_tokens(scores.expand(batch, -1), n_keep))
