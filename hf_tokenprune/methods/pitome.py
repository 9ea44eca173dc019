"""PiToMe: merge within large groups of look-alikes, protect tokens that stand alone.

Follows the published description of Hoai-Chau Tran, Duy M. H. Nguyen, Duy M. Nguyen, Trung-Tin Nguyen, Ngan Le,
Pengtao Xie, Daniel Sonntag, James Zou, Binh T. Nguyen, Mathias Niepert, "Accelerating Transformers with
Spectrum-Preserving Token Merging", NeurIPS 2024 (arXiv 2405.16148). Written from the paper; the official code has a
non-commercial licence and no line of it was used.

Axes: B batch, N prunable tokens, d head width, k tokens merged.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import Where
from ..registry import register_method
from ..signals import Merging, ModelShape, Reduction, Signals, Stage
from ..tokens import num_to_keep, stable_order
from .decoderwise import scaled_ratio
from .layerwise import LayerwiseConfig
from .merging import everything, in_place, mean_keys
from .similarity import SHORT, products, shortened


@register_method("pitome")
@dataclass(frozen=True)
class PiToMeConfig(LayerwiseConfig):
    """PiToMe, in every block by default.

    Args:
        layers: 0-based blocks, ascending. None: all.
        keep_ratios: fraction of the prunable tokens left at each layer, at least 0.5; a number holds for all layers.
            None: 0.925 (only where ``layers`` is None too).
        margin: of the cosine above which two tokens are alike, before the first block; it falls evenly to 0 with depth.
        proportional_attention: in later blocks a token draws attention in proportion to its size, the number of patches
            it stands for.
    """

    where: Where = "mid_block"
    margin: float = 0.9
    proportional_attention: bool = True

    default_blocks: ClassVar[tuple[int, ...]] = tuple(range(1, 13))
    default_keep_ratios: ClassVar[float] = 0.925

    def validate(self) -> None:
        super().validate()
        ratios = self.keep_ratios if isinstance(self.keep_ratios, tuple) else (self.keep_ratios or 1.0,)
        allowed = "0.5 <= ratio <= 1: at most every second token can be merged"
        self.check(all(ratio >= 0.5 for ratio in ratios), "keep_ratios", allowed)
        self.check(-1 <= self.margin <= 1, "margin", "a cosine, -1 to 1")

    def default_layers(self, depth: int) -> list[int]:
        return list(range(depth))

    def scaled(self, strength: float) -> "PiToMeConfig":
        """Every removed fraction multiplied by ``strength``; at least half of the tokens stay at each layer."""
        ratios = self.default_keep_ratios if self.keep_ratios is None else self.keep_ratios
        scaled = [max(0.5, scaled_ratio(r, strength)) for r in (ratios if isinstance(ratios, tuple) else (ratios,))]
        return dataclasses.replace(self, keep_ratios=tuple(scaled) if isinstance(ratios, tuple) else scaled[0])

    def fewest(self, num_tokens: int) -> int:
        return num_tokens - num_tokens // 2

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        return tuple(
            PiToMeStage(layer, self.where, ratio, self.margin * (1 - layer / shape.depth), self.proportional_attention)
            for layer, ratio in self.plan(shape)
        )


@dataclass(frozen=True)
class PiToMeStage(Stage):
    keep_ratio: float
    margin: float
    proportional_attention: bool

    merges: ClassVar[bool] = True

    @property
    def proportional(self) -> bool:
        return self.proportional_attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys"})

    def num_kept(self, num_prunable: int) -> int:
        return max(num_to_keep(num_prunable, self.keep_ratio), num_prunable - num_prunable // 2)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction | Merging:
        """The 2k tokens of greatest energy take part: in that order the 1st, 3rd, ... each join the most similar of the
        2nd, 4th, ..."""
        if n_keep == signals.num_prunable:
            return everything(signals)
        num_protected, count = signals.num_protected, signals.num_prunable - n_keep
        keys = shortened(mean_keys(signals))
        similarity = products(keys, keys, SHORT**-2)
        scores = energy(similarity[:, :, num_protected:], self.margin)
        scores[:, :num_protected] = -math.inf
        order = stable_order(scores, descending=True)
        merged, partners = order[:, 0 : 2 * count : 2], order[:, 1 : 2 * count : 2]
        samples = signals.rows.view(-1)[: order.shape[0], None, None]  # 0, 1, …
        between = similarity[samples, merged.unsqueeze(2), partners.unsqueeze(1)]
        staying = torch.cat([partners, order[:, 2 * count :]], dim=1).sort(dim=1).values
        return in_place(signals, staying, merged, partners.gather(1, between.argmax(-1)))


def energy(similarity: Tensor, margin: float) -> Tensor:
    """(B, T): how many others a token is like, from its cosines with N (B, T, N): mean of f (eq. 4).

    f(x) is x from the margin on, and exp(x − margin) − 1 below.
    """
    alike = torch.where(similarity >= margin, similarity, (similarity - margin).expm1_())
    return alike.mean(-1)  # a token's cosine with itself adds the same to all
